"""What is said of dimensions that their normalization loses or blows up."""

import pytest
import torch

from manipulators.configuration.features import PolicyFeature
from manipulators.configuration.normalization import Part
from manipulators.data.statistics.computing import compute_statistics
from manipulators.processing.fragile import fragile_dimensions
from manipulators.processing.normalization import Normalizer

NAMES = ["arm", "gripper", "noise"]


@pytest.fixture(scope="module")
def statistics():
    """An arm that moves, a gripper that opens in 0.5 % of the frames, and a sensor that shakes by 1e-6."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2000, 3, generator=generator) * torch.tensor([2.0, 0.0, 1e-6])
    values[::200, 1] = 0.08
    return compute_statistics(values.numpy())


def said(mode, statistics, names=NAMES):
    feature = PolicyFeature("ACTION", (3,))
    return fragile_dimensions("action", feature, [Part("action", 3, mode)], statistics, 1e-8, names)


@pytest.mark.parametrize("mode", ["QUANTILES", "QUANTILE10", "q99"])
def test_a_gripper_that_seldom_moves_is_named_with_the_mode_that_keeps_it(statistics, mode):
    gripper, noise = said(mode, statistics)
    share = "10 %" if mode == "QUANTILE10" else "1 %"
    assert gripper.startswith(
        f"gripper of action moves from 0 to 0.08 in under {share} of the frames: it counts as constant, and always "
        f"decodes to 0 by {mode}. MIN_MAX keeps it: normalization_mapping={{'ACTION': 'MIN_MAX'}} in the config ("
    )
    assert noise.startswith(
        "noise of action moves by no more than 1e-06, noise that becomes as large as what moves by 2"
    )
    assert "--config.normalization_mapping '{ACTION: IDENTITY}'" in noise
    # It is so: whatever the network says, the gripper stays; by the other mode it does not.
    lost, kept = (Normalizer("action", [Part("action", 3, m)], statistics) for m in (mode, "MIN_MAX"))
    assert lost.unnormalize(torch.tensor([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]]))[:, 1].tolist() == [0, 0]
    ends = kept.unnormalize(kept.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.08, 0.0]])))[:, 1]
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.08]))


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD", "min_max"])
def test_modes_that_keep_the_gripper_are_not_blamed(statistics, mode):
    assert [sentence.split()[0] for sentence in said(mode, statistics)] == ["noise"]


@pytest.mark.parametrize("mode", ["IDENTITY", "identity", "binary", "scale"])
def test_modes_that_do_not_divide_by_the_spread_are_not_blamed(statistics, mode):
    assert said(mode, statistics) == []


def test_values_that_become_huge_are_named(statistics):
    wild = {name: value.copy() for name, value in statistics.items()}
    wild["q99"][1] = 1e-5  # of the gripper: 0.08 becomes 16000
    (gripper, _) = said("QUANTILES", wild, names=None)
    assert gripper.startswith(
        "dimension 1 of action lies between 0 and 0.08, which becomes up to 1.6e+04 by QUANTILES."
    )
    assert said("q99", wild)[0].startswith("noise")  # cut off at 1


def test_without_a_recorded_range_nothing_is_said(statistics):
    assert said("MEAN_STD", {which: statistics[which] for which in ("mean", "std")}) == [] == said("MEAN_STD", None)


def test_a_part_of_several_is_named(statistics):
    feature, parts = PolicyFeature("STATE", (3,)), [Part("arm", 1, "min_max"), Part("rest", 2, "q99")]
    gripper, _ = fragile_dimensions("observation.state", feature, parts, statistics, 0.0)
    assert gripper.endswith("always decodes to 0 by q99. The mode 'min_max' of the part 'rest' keeps it.")
