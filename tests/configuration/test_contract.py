"""The contract from a processor's saved fields: what each number is, how it is normalised, to what it is relative."""

import math

import pytest

from manipulators.configuration.contract import Contract, Dimension
from manipulators.configuration.normalization import MODES, PART_MODES
from manipulators.errors import InvalidConfigError

FIELDS = {
    "input_features": {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 4, 6]},
        "observation.state": {"type": "STATE", "shape": [2]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"},
    "statistics": {
        "observation.state": {"mean": [0.0, 0.0], "std": [1.0, 1.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]},
        "action": {"min": [-0.5, 0.0], "max": [0.5, 1.0]},
    },
    "dimension_names": {"action": ["lift", "grip"], "observation.state": ["height", "opening"]},
    "units": {"action": ["m", "1"]},
    "optional_cameras": ["observation.images.top"],
    "relative_to": [0, None],
}


def test_every_dimension_is_described():
    camera, state, action = Contract.from_fields(FIELDS).entries
    assert (camera.direction, camera.optional, camera.normalization, camera.dimensions) == ("in", True, "IDENTITY", ())
    assert list(state.dimensions) == [
        Dimension("height", None, -1.0, 1.0, "MEAN_STD"),
        Dimension("opening", None, -2.0, 2.0, "MEAN_STD"),
    ]
    assert action.direction == "out"
    assert list(action.dimensions) == [
        Dimension("lift", "m", -0.5, 0.5, "MIN_MAX", "observation.state height"),
        Dimension("grip", "1", 0.0, 1.0, "MIN_MAX"),
    ]


def test_range_of_a_difference_is_said_to_be_one():
    contract = Contract.from_fields({**FIELDS, "dimension_names": None})
    lines = [" ".join(line.split()) for line in str(contract).splitlines()]
    assert lines[-2:] == [
        "0 unnamed [m] -0.5 … 0.5 as a difference relative to observation.state 0",
        "1 unnamed [1] 0 … 1",
    ]
    (action,) = contract.outputs
    assert action.absolute_range == [(-math.inf, math.inf), (0.0, 1.0)]


@pytest.mark.parametrize("mode", PART_MODES)
def test_every_mode_of_a_part(mode):
    parts = {"arm": {"width": 1, "mode": "min_max"}, "rest": {"width": 1, "mode": mode}}
    contract = Contract.from_fields({**FIELDS, "state_parts": parts, "action_parts": None})
    state, action = contract.entries[1:]
    assert [dimension.normalization for dimension in state.dimensions] == ["min_max", mode]
    assert state.normalization == f"arm (1) min_max, rest (1) {mode}"
    assert state.normalization_words == f"arm training range to [-1, 1]; rest {MODES[mode].words}"
    # A policy that normalises by parts takes NVIDIA's rules for an action without parts, too.
    assert action.normalization == "action (2) min_max"
    assert [dimension.normalization for dimension in action.dimensions] == ["min_max", "min_max"]


def test_chosen_robot():
    robots = {"left": FIELDS["statistics"], "right": {"action": {"min": [5.0, 6.0], "max": [7.0, 8.0]}}}
    fields = {**FIELDS, "statistics": None, "embodiments": robots}
    (action,) = Contract.from_fields({**fields, "embodiment": "right"}).outputs
    assert [dimension.low for dimension in action.dimensions] == [5.0, 6.0]
    assert Contract.from_fields({**fields, "embodiment": None}).outputs[0].absolute_range is None


def test_what_was_not_recorded():
    features = {name: FIELDS[name] for name in ("input_features", "output_features")}
    contract = Contract.from_fields(features)
    assert contract.outputs[0].dimensions == (Dimension(), Dimension())
    assert "normalization not recorded" in str(contract)
    assert not contract.reads_instruction
    assert Contract.from_fields({**features, "max_instruction_tokens": 9}).instruction_tokens == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": {"action": ["m"]}}, "action has 2 dimensions but 1 units: m"),
        ({"relative_to": [0, 1, None]}, "action has 2 dimensions but 3 references"),
        ({"statistics": [1]}, r"statistics is a mapping; got \[1\]"),
        ({"state_parts": {"arm": {"width": 3, "mode": "min_max"}}}, "width 2, but its parts have 3 together"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        Contract.from_fields({**FIELDS, **fields})
