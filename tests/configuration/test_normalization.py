"""The table of modes, and parts of a feature described rightly and wrongly."""

import pytest

from manipulators import NormalizationMode
from manipulators.configuration.normalization import MODES, PART_MODES, Part, one_part, read_parts
from manipulators.errors import InvalidConfigError


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"arm": {"width": 2, "mode": "minmax"}}, "'arm' of action has mode 'minmax'. Did you mean 'min_max'"),
        ({"arm": {"width": 0, "mode": "min_max"}}, "has width 0; it is at least 1"),
        ({"arm": {"width": "2", "mode": "min_max"}}, "has width '2'; it is at least 1"),
        ({"arm": {"width": 2}}, "write {'width': 6, 'mode': 'min_max'}"),
        ({"arm": 2}, "'arm' of action is 2"),
        ({"arm": {"width": 3, "mode": "min_max"}}, "action has width 2, but its parts have 3 together: arm 3"),
        ({"arm": {"width": 2, "mode": "sin_cos"}}, "has mode 'sin_cos', which has no inverse"),
    ],
)
def test_impossible_parts(parts, message):
    with pytest.raises(InvalidConfigError, match=message):
        read_parts("action", parts, 2)


def test_one_part_takes_the_mode_of_its_type():
    parts = [one_part("observation.state", 3, mode) for mode in ("MIN_MAX", "QUANTILES", "IDENTITY")]
    assert parts == [Part("state", 3, "min_max"), Part("state", 3, "q99"), Part("state", 3, "identity")]
    with pytest.raises(InvalidConfigError, match=r"no mode QUANTILE10\. Available: IDENTITY, MEAN_STD, MIN_MAX"):
        one_part("observation.state", 3, NormalizationMode.QUANTILE10)


def test_modes_of_features_and_of_parts_are_rows_of_one_table():
    assert {"IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"} <= {mode.value for mode in NormalizationMode}
    assert {*PART_MODES, *(mode.value for mode in NormalizationMode)} == set(MODES)
    assert all(row.of_part in PART_MODES for row in MODES.values() if row.of_part)
