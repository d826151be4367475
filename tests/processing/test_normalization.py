"""Every mode, against numbers worked out by hand, and as the inverse of itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manipulators import NormalizationMode, PolicyFeature
from manipulators.configuration.normalization import MODES as TABLE
from manipulators.configuration.normalization import PART_MODES, Part, read_parts
from manipulators.errors import MissingStatisticsError
from manipulators.processing.normalization import Normalizer, whole_statistics

STATE = PolicyFeature("STATE", (2,))
STATISTICS = {
    "mean": [1.0, -2.0],
    "std": [2.0, 0.5],
    "min": [0.0, -4.0],
    "max": [4.0, 4.0],
    "q01": [1.0, -2.0],
    "q99": [3.0, 2.0],
    "q10": [0.0, 0.0],
    "q90": [1.0, 4.0],
}
MODES = [mode.value for mode in NormalizationMode]


def normalizer(mode, statistics=STATISTICS, feature=STATE, **options):
    parts = [Part("state", feature.shape[0], mode)]
    return Normalizer("observation.state", parts, statistics, trailing=len(feature.shape) - 1, **options)


@pytest.mark.parametrize(
    ("mode", "raw", "expected"),
    [
        ("IDENTITY", [3.0, -1.0], [3.0, -1.0]),
        ("MEAN_STD", [3.0, -1.0], [1.0, 2.0]),
        ("MEAN_STD", [1.0, -2.0], [0.0, 0.0]),
        ("MIN_MAX", [0.0, 4.0], [-1.0, 1.0]),
        ("MIN_MAX", [3.0, 0.0], [0.5, 0.0]),
        ("MIN_MAX", [6.0, -8.0], [2.0, -2.0]),  # beyond what was demonstrated: not clipped
        ("QUANTILES", [2.0, 3.0], [0.0, 1.5]),
        ("QUANTILE10", [0.25, 1.0], [-0.5, -0.5]),
    ],
)
def test_numbers(mode, raw, expected):
    norm = normalizer(mode)
    torch.testing.assert_close(norm.normalize(torch.tensor(raw)), torch.tensor(expected))
    torch.testing.assert_close(norm.unnormalize(torch.tensor(expected)), torch.tensor(raw))


def test_epsilon_is_added_to_the_standard_deviation_only():
    raw = torch.tensor([3.0, -1.0])
    torch.testing.assert_close(normalizer("MEAN_STD", eps=0.5).normalize(raw), torch.tensor([2 / 2.5, 1 / 1.0]))
    torch.testing.assert_close(normalizer("MIN_MAX", eps=0.5).normalize(raw), torch.tensor([0.5, -0.25]))


@pytest.mark.parametrize(
    ("mode", "low", "other", "on_the_spot", "one_beyond"),
    [("MEAN_STD", "mean", {"std": [0.0, 1.0]}, 0.0, 1.0), ("MIN_MAX", "min", {"max": [5.0, 6.0]}, -1.0, 1.0)],
)
def test_constant_dimension(mode, low, other, on_the_spot, one_beyond):
    norm = normalizer(mode, {low: [5.0, 5.0]} | other)
    assert norm.normalize(torch.tensor([5.0, 5.0]))[0] == on_the_spot
    assert norm.normalize(torch.tensor([6.0, 5.0]))[0] == one_beyond  # shifted, not blown up
    assert norm.unnormalize(torch.tensor([123.0, 0.0]))[0] == 5.0  # whatever the network says


def test_images_have_one_statistic_per_channel():
    camera = PolicyFeature("VISUAL", (2, 1, 3))
    statistics = {"mean": [[[0.5]], [[0.0]]], "std": [0.5, 0.25]}  # (c, 1, 1) or (c,)
    norm = normalizer("MEAN_STD", statistics, camera)
    image = torch.tensor([[[0.0, 0.5, 1.0]], [[0.0, 0.5, 1.0]]])
    expected = torch.tensor([[[-1.0, 0.0, 1.0]], [[0.0, 2.0, 4.0]]])
    torch.testing.assert_close(norm.normalize(image), expected)
    torch.testing.assert_close(norm.normalize(image.expand(4, 2, 2, 1, 3)), expected.expand(4, 2, 2, 1, 3))


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions_do_not_matter(mode):
    norm, x = normalizer(mode), torch.randn(5, 4, 2)
    torch.testing.assert_close(norm.normalize(x)[3, 2], norm.normalize(x[3, 2]))
    torch.testing.assert_close(norm.unnormalize(x)[3, 2], norm.unnormalize(x[3, 2]))


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    offset=st.lists(st.floats(-100, 100), min_size=2, max_size=2),
    spread=st.lists(st.floats(1e-2, 100), min_size=2, max_size=2),
    relative=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_unnormalize_is_the_inverse(mode, offset, spread, relative):
    first, second = NormalizationMode(mode).statistics or ("mean", "std")
    other = spread if mode in ("MEAN_STD", "IDENTITY") else [a + b for a, b in zip(offset, spread, strict=True)]
    norm = normalizer(mode, {first: offset, second: other})
    x = torch.tensor([o + s * r for o, s, r in zip(offset, spread, relative, strict=True)], dtype=torch.float32)
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x, rtol=1e-5, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-50, 50), width=st.floats(0.01, 50), fraction=st.floats(0, 1))
def test_what_was_demonstrated_lies_between_minus_one_and_one(low, width, fraction):
    norm = normalizer("MIN_MAX", {"min": [low] * 2, "max": [low + width] * 2})
    y = norm.normalize(torch.tensor([low + fraction * width] * 2, dtype=torch.float32))
    assert y.abs().max() <= 1 + 1e-2


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "IDENTITY"])
def test_missing_statistics_are_named(mode):
    first, second = NormalizationMode(mode).statistics
    for statistics in (None, {}, {first: [0.0, 0.0]}, {second: [1.0, 1.0]}):
        with pytest.raises(MissingStatisticsError, match=f"needs {first} and {second}"):
            normalizer(mode, statistics)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": [0.0] * 3, "std": [1.0] * 3}, r"has 3 values \(shape \(3,\)\); the feature has 2"),
        ({"mean": [0.0, float("nan")], "std": [1.0] * 2}, "mean of observation.state is not finite"),
        ({"mean": [0.0] * 2, "std": [1.0, float("inf")]}, "std of observation.state is not finite"),
        ({"mean": [0.0] * 2, "std": [1.0, -1.0]}, "std is negative"),
    ],
)
def test_impossible_statistics(statistics, message):
    with pytest.raises(MissingStatisticsError, match=message):
        normalizer("MEAN_STD", statistics)


def test_maximum_below_minimum():
    with pytest.raises(MissingStatisticsError, match="max lies below min"):
        normalizer("MIN_MAX", {"min": [0.0, 0.0], "max": [1.0, -1.0]})


def test_statistics_may_be_numpy():
    norm = normalizer("MEAN_STD", {"mean": np.array([1, 2]), "std": np.array([1.0, 2.0])})
    assert norm.normalize(torch.tensor([2.0, 4.0])).tolist() == pytest.approx([1, 1])


# --- parts, by NVIDIA's rules -----------------------------------------------------------------------------

# The second dimension never moved: there is no spread to divide by.
NVIDIA = {
    "min": [0.0, 3.0],
    "max": [4.0, 3.0],
    "q01": [1.0, 0.5],
    "q99": [3.0, 0.5],
    "mean": [1.0, 7.0],
    "std": [2.0, 0.0],
}


def arm(mode, statistics=NVIDIA, width=2, feature="observation.state"):
    return Normalizer(feature, read_parts(feature, {"arm": {"width": width, "mode": mode}}, width), statistics)


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
def test_numbers_of_parts(mode, raw, expected, back):
    norm = arm(mode)
    y = norm.normalize(torch.tensor(raw))
    torch.testing.assert_close(y, torch.tensor(expected))
    torch.testing.assert_close(norm.unnormalize(y), torch.tensor(back))


def test_scale_of_what_was_always_zero():
    norm = arm("scale", {"min": [0.0, -2.0], "max": [0.0, 1.0]})
    assert norm.normalize(torch.tensor([5.0, 1.0])).tolist() == [0.0, 0.5]
    assert norm.unnormalize(torch.tensor([5.0, 0.5])).tolist() == [0.0, 1.0]


def test_angles_become_sines_then_cosines():
    parts = {"joints": {"width": 2, "mode": "sin_cos"}, "grip": {"width": 1, "mode": "identity"}}
    norm = Normalizer("observation.state", read_parts("observation.state", parts, 3), None)
    y = norm.normalize(torch.tensor([0.0, torch.pi / 2, 7.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0, 1.0, 0.0, 7.0]))


def test_every_part_has_its_own_mode():
    parts = read_parts("action", {"arm": {"width": 1, "mode": "min_max"}, "grip": {"width": 1, "mode": "binary"}}, 2)
    norm = Normalizer("action", parts, {"min": [0.0, 0.0], "max": [4.0, 0.1]})
    torch.testing.assert_close(norm.normalize(torch.tensor([[1.0, 0.9]])), torch.tensor([[-0.5, 1.0]]))
    torch.testing.assert_close(norm.unnormalize(torch.tensor([[-0.5, 0.7]])), torch.tensor([[1.0, 1.0]]))


def test_double_precision_is_kept():
    x = torch.tensor([1 / 3, 3.0], dtype=torch.float64)
    assert arm("min_max").normalize(x).dtype == torch.float64
    assert arm("min_max").normalize(x)[0].item() == pytest.approx(1 / 6 - 1, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    modes=st.lists(st.sampled_from(["min_max", "q99", "mean_std", "scale", "identity"]), min_size=1, max_size=4),
    low=st.floats(-50, 50),
    spread=st.floats(0.01, 50),
    fraction=st.floats(0, 1),
)
def test_unnormalize_is_the_inverse_by_parts(modes, low, spread, fraction):
    """Of every value that was demonstrated."""
    width = len(modes)
    parts = {f"part{i}": {"width": 1, "mode": mode} for i, mode in enumerate(modes)}
    first, second = [low] * width, [low + spread] * width
    statistics = {"min": first, "max": second, "q01": first, "q99": second, "mean": first, "std": [spread] * width}
    norm = Normalizer("action", read_parts("action", parts, width), statistics)
    x = torch.full((2, width), low + fraction * spread, dtype=torch.float64)
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["min_max", "q99"]), low=st.floats(-50, 50), fraction=st.floats(0, 1))
def test_what_was_demonstrated_by_parts_lies_between_minus_one_and_one(mode, low, fraction):
    norm = arm(mode, dict.fromkeys(("min", "q01"), [low] * 2) | dict.fromkeys(("max", "q99"), [low + 2.0] * 2))
    y = norm.normalize(torch.tensor([low + 2 * fraction] * 2, dtype=torch.float64))
    assert y.abs().max() <= 1 + 1e-9


# --- statistics of parts-------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("mode", [mode for mode, needed in PART_MODES.items() if needed.statistics])
def test_missing_statistics_of_parts_are_named(mode):
    first, second = TABLE[mode].statistics
    for statistics in (None, {first: [0.0, 0.0]}):
        with pytest.raises(MissingStatisticsError, match=f"'arm' of observation.state .* needs {first} and {second}"):
            arm(mode, statistics)


@pytest.mark.parametrize(
    ("mode", "statistics", "message"),
    [
        (
            "min_max",
            {"min": [0.0] * 3, "max": [1.0] * 3},
            r"min of observation\.state has 3 values \(shape \(3,\)\); the feature has 2",
        ),
        ("mean_std", {"mean": [0.0, 0.0], "std": [1.0, -1.0]}, "std is negative"),
        ("q99", {"q01": [0.0, 2.0], "q99": [1.0, 1.0]}, "q99 lies below q01"),
        ("min_max", {"min": [0.0, float("nan")], "max": [1.0, 1.0]}, "min of observation.state is not finite"),
    ],
)
def test_impossible_statistics_of_parts(mode, statistics, message):
    with pytest.raises(MissingStatisticsError, match=message):
        arm(mode, statistics)


# --- values that cannot be ------------------------------------------------------------------------------


RANGE = {"min": [-1.0, -4.0], "max": [1.0, 4.0]}


@pytest.mark.parametrize(
    ("mode", "statistics", "message"),
    [
        ("MEAN_STD", {"mean": [0.0, 0.0], "std": [1.0, 3e38]}, r"in dimensions \[1\].*infinite"),
        ("mean_std", {"mean": [0.0, 3e38], "std": [1.0, 1.0]}, r"in dimensions \[1\].*infinite"),
        ("mean_std", {"mean": [0.0, 0.0], "std": [1e-40, 1.0]}, r"in dimensions \[0\].*infinite"),
        ("MIN_MAX", {"min": [0.0, -3e38], "max": [1.0, 3e38]}, r"in dimensions \[1\].*infinite"),
        ("QUANTILES", {"q01": [0.0, 0.0], "q99": [1.0, 1e39]}, r"in dimensions \[1\].*infinite"),
        ("scale", {"min": [0.0, 0.0], "max": [1e37, 1.0]}, r"in dimensions \[0\].*infinite"),
        ("MEAN_STD", RANGE | {"mean": [0.0, 0.0], "std": [1000.0, 1.0]}, r"in dimensions \[0\] std .* 1000, min"),
        ("MEAN_STD", RANGE | {"mean": [0.0, 5.0], "std": [0.5, 1.0]}, r"in dimensions \[1\] mean .* max is 4"),
        ("MIN_MAX", RANGE | {"mean": [-30.0, 0.0]}, r"in dimensions \[0\] mean"),
        ("QUANTILES", RANGE | {"q01": [-1.0, -9.0], "q99": [1.0, 4.0]}, r"in dimensions \[1\] q01"),
        ("q99", RANGE | {"q01": [-1.0, -4.0], "q99": [2.0, 4.0]}, r"in dimensions \[0\] q99"),
    ],
)
def test_statistics_that_cannot_be_are_found_when_they_are_taken(mode, statistics, message):
    with pytest.raises(MissingStatisticsError, match=message):
        normalizer(mode, statistics)


@pytest.mark.parametrize(
    "statistics",
    [
        {"mean": [0.0, 0.0], "std": [1000.0, 1.0]},  # ticks of a motor: without a range nothing contradicts it
        {"mean": [2048.0, 0.0], "std": [1000.0, 1.0], "min": [0.0, -4.0], "max": [4095.0, 4.0]},
        {"mean": [0.4, 0.0], "std": [0.9, 1.0], "min": [0.3, -4.0], "max": [0.3, 4.0]},  # did not move
        {"mean": [0.7, 0.0], "std": [1.414, 1.0], "min": [-0.3, -4.0], "max": [1.7, 4.0]},  # of two samples
    ],
)
def test_unusual_statistics_are_taken(statistics):
    norm, x = normalizer("MEAN_STD", statistics), torch.tensor([0.3, 0.1])
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x, atol=1e-3, rtol=0)


def test_a_cameras_mean_may_be_that_of_other_pictures():
    camera = PolicyFeature("VISUAL", (1, 1, 1))
    normalizer("MEAN_STD", {"mean": [0.485], "std": [0.229], "min": [0.0], "max": [0.1]}, camera)
