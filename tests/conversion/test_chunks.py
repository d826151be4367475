"""A toy project's ACT, through every door."""

import json
from itertools import product

import torch
from safetensors.torch import save_file
from transformers import AutoModel

from manipulators import ACTPolicy, AutoPolicy, PolicyPipeline
from manipulators.cli import main


def test_every_door(tiny_act, statistics_of, tmp_path):
    config = tiny_act()
    policy = ACTPolicy(config).eval()
    written = {"chunks_version": 1, "policy": config.to_dict(), "statistics": statistics_of(config)}
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(written))
    save_file({f"net.{name}": x for name, x in policy.state_dict().items()}, published / "model.safetensors")
    inputs = {"state": torch.ones(1, 3)}
    expected = policy.predict_action_chunk(**inputs)
    assert main(["convert", str(published), str(tmp_path / "ours")]) == 0
    for door, folder in product((AutoPolicy, ACTPolicy), (published, tmp_path / "ours")):
        assert torch.equal(door.from_pretrained(folder).predict_action_chunk(**inputs), expected)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "ours").predict_action_chunk(**inputs), expected)
    pipeline = PolicyPipeline.from_pretrained(published, device="cpu", chunk_size=5)
    assert pipeline({"observation.state": torch.zeros(3)}).shape == (2,)
