"""GR00T N1 has the published model's weights; its parts reproduce the reference where they are tested."""

import json

import torch

from manipulators import GR00TN1Config, GR00TN1Policy
from manipulators.conversion.gr00t import rename_gr00t_weights


def test_the_published_model_has_these_weights(shared):
    """Names and shapes at real size, without storage."""
    table = json.loads((shared / "specs" / "gr00t_n1_keys.json").read_text())
    with torch.device("meta"):
        policy = GR00TN1Policy(GR00TN1Config())
    names = rename_gr00t_weights(table)
    assert names.keys() != table.keys() and len(names) == len(table)
    assert {n: list(v.shape) for n, v in policy.state_dict().items()} == names
