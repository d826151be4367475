"""Parts of a state or an action, by NVIDIA's rules: numbers worked out by hand, and as the inverse of itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manipulators import NormalizationMode
from manipulators.errors import InvalidConfigError, MissingStatisticsError
from manipulators.processing.parts import MODES, PartsNormalizer, one_part, read_parts, whole_statistics

# The second dimension never moved: there is no spread to divide by.
STATISTICS = {
    "min": [0.0, 3.0],
    "max": [4.0, 3.0],
    "q01": [1.0, 0.5],
    "q99": [3.0, 0.5],
    "mean": [1.0, 7.0],
    "std": [2.0, 0.0],
}


def normalizer(mode, statistics=STATISTICS, width=2, feature="observation.state"):
    return PartsNormalizer(feature, read_parts(feature, {"arm": {"width": width, "mode": mode}}, width), statistics)


@pytest.mark.parametrize(
    ("mode", "raw", "expected", "back"),
    [
        ("min_max", [3.0, 3.0], [0.5, 0.0], [3.0, 3.0]),
        ("min_max", [6.0, 9.0], [2.0, 0.0], [6.0, 3.0]),  # not cut off
        ("q99", [2.5, 0.5], [0.5, 0.5], [2.5, 0.5]),
        ("q99", [6.0, 9.0], [1.0, 1.0], [3.0, 0.5]),  # cut off
        ("q99", [0.0, -9.0], [-1.0, -1.0], [1.0, 0.5]),
        ("mean_std", [5.0, 6.0], [2.0, 6.0], [5.0, 7.0]),
        ("scale", [2.0, -1.5], [0.5, -0.5], [2.0, -1.5]),
        ("binary", [0.5, 0.51], [0.0, 1.0], [0.0, 1.0]),
        ("identity", [0.5, -9.0], [0.5, -9.0], [0.5, -9.0]),
    ],
)
def test_numbers(mode, raw, expected, back):
    norm = normalizer(mode)
    y = norm.normalize(torch.tensor(raw))
    torch.testing.assert_close(y, torch.tensor(expected))
    torch.testing.assert_close(norm.unnormalize(y), torch.tensor(back))


def test_scale_of_what_was_always_zero():
    norm = normalizer("scale", {"min": [0.0, -2.0], "max": [0.0, 1.0]})
    assert norm.normalize(torch.tensor([5.0, 1.0])).tolist() == [0.0, 0.5]
    assert norm.unnormalize(torch.tensor([5.0, 0.5])).tolist() == [0.0, 1.0]


def test_angles_become_sines_then_cosines():
    parts = {"joints": {"width": 2, "mode": "sin_cos"}, "grip": {"width": 1, "mode": "identity"}}
    norm = PartsNormalizer("observation.state", read_parts("observation.state", parts, 3), None)
    y = norm.normalize(torch.tensor([0.0, torch.pi / 2, 7.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0, 1.0, 0.0, 7.0]))


def test_every_part_has_its_own_mode():
    parts = read_parts("action", {"arm": {"width": 1, "mode": "min_max"}, "grip": {"width": 1, "mode": "binary"}}, 2)
    norm = PartsNormalizer("action", parts, {"min": [0.0, 0.0], "max": [4.0, 0.1]})
    torch.testing.assert_close(norm.normalize(torch.tensor([[1.0, 0.9]])), torch.tensor([[-0.5, 1.0]]))
    torch.testing.assert_close(norm.unnormalize(torch.tensor([[-0.5, 0.7]])), torch.tensor([[1.0, 1.0]]))


def test_double_precision_is_kept():
    x = torch.tensor([1 / 3, 3.0], dtype=torch.float64)
    assert normalizer("min_max").normalize(x).dtype == torch.float64
    assert normalizer("min_max").normalize(x)[0].item() == pytest.approx(1 / 6 - 1, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    modes=st.lists(st.sampled_from(["min_max", "q99", "mean_std", "scale", "identity"]), min_size=1, max_size=4),
    low=st.floats(-50, 50),
    spread=st.floats(0.01, 50),
    fraction=st.floats(0, 1),
)
def test_unnormalize_is_the_inverse(modes, low, spread, fraction):
    """Of every value that was demonstrated."""
    width = len(modes)
    parts = {f"part{i}": {"width": 1, "mode": mode} for i, mode in enumerate(modes)}
    first, second = [low] * width, [low + spread] * width
    statistics = {"min": first, "max": second, "q01": first, "q99": second, "mean": first, "std": [spread] * width}
    norm = PartsNormalizer("action", read_parts("action", parts, width), statistics)
    x = torch.full((2, width), low + fraction * spread, dtype=torch.float64)
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["min_max", "q99"]), low=st.floats(-50, 50), fraction=st.floats(0, 1))
def test_what_was_demonstrated_lies_between_minus_one_and_one(mode, low, fraction):
    norm = normalizer(mode, dict.fromkeys(("min", "q01"), [low] * 2) | dict.fromkeys(("max", "q99"), [low + 2.0] * 2))
    y = norm.normalize(torch.tensor([low + 2 * fraction] * 2, dtype=torch.float64))
    assert y.abs().max() <= 1 + 1e-9


# --- descriptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"arm": {"width": 2, "mode": "minmax"}}, "'arm' of action has mode 'minmax'. Did you mean 'min_max'"),
        ({"arm": {"width": 0, "mode": "min_max"}}, "has width 0; it is at least 1"),
        ({"arm": {"width": "2", "mode": "min_max"}}, "has width '2'; it is at least 1"),
        ({"arm": {"width": 2}}, "write {'width': 6, 'mode': 'min_max'}"),
        ({"arm": 2}, "'arm' of action is 2"),
        ({"arm": {"width": 3, "mode": "min_max"}}, "action has width 2, but its parts have 3 together: arm 3"),
        ({"arm": {"width": 2, "mode": "sin_cos"}}, "has mode 'sin_cos', which has no way back"),
    ],
)
def test_impossible_parts(parts, message):
    with pytest.raises(InvalidConfigError, match=message):
        read_parts("action", parts, 2)


def test_one_part_takes_the_mode_of_its_type():
    modes = {mode: one_part("state", 3, NormalizationMode(mode)) for mode in ("MIN_MAX", "QUANTILES", "IDENTITY")}
    assert modes["MIN_MAX"] == {"state": {"width": 3, "mode": "min_max"}}
    assert [part["state"]["mode"] for part in modes.values()] == ["min_max", "q99", "identity"]
    with pytest.raises(InvalidConfigError, match=r"knows no QUANTILE10\. Available: MIN_MAX, QUANTILES, MEAN_STD"):
        one_part("state", 3, NormalizationMode.QUANTILE10)


# --- statistics -------------------------------------------------------------------------------------------

ARM_AND_GRIP = {"arm": {"width": 2, "mode": "min_max"}, "grip": {"width": 1, "mode": "binary"}}
BY_PART = {"arm": {"min": [0.0, 1.0], "max": [2.0, 3.0], "std": [1.0, 1.0]}, "grip": {"min": [0.0], "max": [1.0]}}


@pytest.mark.parametrize(
    "statistics",
    [
        {"observation.state": BY_PART},
        {"state": BY_PART},
        {"state.arm": BY_PART["arm"], "state.grip": BY_PART["grip"], "action.arm": {}},
        {"observation.state": {"min": [0.0, 1.0, 0.0], "max": [2.0, 3.0, 1.0]}},
    ],
)
def test_statistics_in_every_form(statistics):
    """What only some parts have is left out."""
    whole = whole_statistics("observation.state", read_parts("observation.state", ARM_AND_GRIP, 3), statistics)
    assert {which: torch.as_tensor(value).tolist() for which, value in whole.items()} == {
        "min": [0.0, 1.0, 0.0],
        "max": [2.0, 3.0, 1.0],
    }


def test_no_statistics():
    assert whole_statistics("action", read_parts("action", ARM_AND_GRIP, 3), {}) is None


@pytest.mark.parametrize(
    ("by_part", "message"),
    [
        ({"arm": BY_PART["arm"]}, "by part, and grip has none; there are: arm"),
        (BY_PART | {"grip": {"min": [0.0, 0.0], "max": [1.0, 1.0]}}, "min of 'grip' in action has 2 values, not 1"),
    ],
)
def test_statistics_of_parts_that_do_not_fit(by_part, message):
    with pytest.raises(MissingStatisticsError, match=message):
        whole_statistics("action", read_parts("action", ARM_AND_GRIP, 3), {"action": by_part})


@pytest.mark.parametrize("mode", [mode for mode, needed in MODES.items() if needed])
def test_missing_statistics_are_named(mode):
    first, second = MODES[mode]
    for statistics in (None, {first: [0.0, 0.0]}):
        with pytest.raises(MissingStatisticsError, match=f"'arm' of observation.state .* needs {first} and {second}"):
            normalizer(mode, statistics)


@pytest.mark.parametrize(
    ("mode", "statistics", "message"),
    [
        ("min_max", {"min": [0.0] * 3, "max": [1.0] * 3}, "min of observation.state has 3 values; its parts have 2"),
        ("mean_std", {"mean": [0.0, 0.0], "std": [1.0, -1.0]}, "std is negative"),
        ("q99", {"q01": [0.0, 2.0], "q99": [1.0, 1.0]}, "q99 lies below q01"),
        ("min_max", {"min": [0.0, float("nan")], "max": [1.0, 1.0]}, "min of observation.state is not finite"),
    ],
)
def test_impossible_statistics(mode, statistics, message):
    with pytest.raises(MissingStatisticsError, match=message):
        normalizer(mode, statistics)
