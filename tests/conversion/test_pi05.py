"""Every weight of the real-size π0.5, as LeRobot and openpi publish it, fits ours; nothing is allocated."""

import json

import pytest
import torch

from manipulators import PI05Policy, PI05PolicyConfig
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.conversion.pi05 import pi05_fields

CONFIG = {
    "type": "pi05",
    "input_features": {
        "observation.state": {"type": "STATE", "shape": [7]},
        "observation.images.base": {"type": "VISUAL", "shape": [3, 480, 640]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
}


@pytest.fixture(scope="module")
def rows(shared):
    return json.loads((shared / "specs" / "pi05_keys.json").read_text())["keys"].values()


@pytest.fixture(scope="module")
def expected():
    """Names and shapes of our real-size model."""
    with torch.device("meta"):
        policy = PI05Policy(PI05PolicyConfig.from_dict(pi05_fields(CONFIG, {})))
    return {name: list(weight.shape) for name, weight in policy.state_dict().items()}


@pytest.mark.parametrize("layout", ["openpi", "lerobot_pi05_base", "lerobot_save"])
def test_every_weight_of_every_layout(rows, expected, layout):
    published = {row[layout]: row["shape"] for row in rows if row[layout]}
    assert len(published) > 800 and rename_pi0_weights(published) == expected


def test_its_size_and_its_own_names(expected):
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 3_353_433_872
    assert rename_pi0_weights(expected) == expected
