"""Features are read from what JSON and users write, and refused when no network could be built from them."""

import pytest

from manipulators import FeatureType, NormalizationMode, PolicyFeature
from manipulators.errors import InvalidConfigError


@pytest.mark.parametrize("kind", ["STATE", "state", FeatureType.STATE])
def test_type_and_shape_are_normalised(kind):
    feature = PolicyFeature(type=kind, shape=[7])
    assert feature == PolicyFeature(type=FeatureType.STATE, shape=(7,))
    assert feature.to_dict() == {"type": "STATE", "shape": [7]}
    assert PolicyFeature.from_value(feature.to_dict()) == feature
    assert PolicyFeature.from_value(feature) is feature


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("STAT", [3], "'STAT' does not exist. Did you mean 'STATE'"),
        ("STATE", [], "at least one size"),
        ("STATE", [0], "each at least 1"),
        ("STATE", [-3], "each at least 1"),
        ("STATE", 3, "not a sequence of integers"),
        ("STATE", ["a"], "not a sequence of integers"),
        ("STATE", "37", "not a sequence of integers"),
        ("STATE", [2.7], "not a sequence of integers"),
        ("VISUAL", [32, 32], "channels, height, width"),
        ("VISUAL", [2, 3, 32, 32], "channels, height, width"),
    ],
)
def test_refusals(kind, shape, message):
    with pytest.raises(InvalidConfigError, match=message):
        PolicyFeature(type=kind, shape=shape)


@pytest.mark.parametrize("value", [3, None, {"type": "STATE"}, {"type": "STATE", "shape": [3], "names": ["x"]}])
def test_values_that_are_no_feature(value):
    with pytest.raises(InvalidConfigError, match="is not a feature"):
        PolicyFeature.from_value(value)


@pytest.mark.parametrize(
    ("mode", "needed"),
    [
        ("IDENTITY", ()),
        ("MEAN_STD", ("mean", "std")),
        ("MIN_MAX", ("min", "max")),
        ("QUANTILES", ("q01", "q99")),
        ("QUANTILE10", ("q10", "q90")),
    ],
)
def test_statistics_that_a_mode_needs(mode, needed):
    assert NormalizationMode(mode).statistics == needed
