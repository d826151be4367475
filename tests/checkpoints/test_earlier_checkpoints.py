"""Checkpoints that earlier versions wrote, one tiny one of each policy, load and give the same actions.

Each folder is as it was saved; `example.safetensors` holds an observation, the draws, and the actions in robot units
that the version which wrote it predicted. A folder is added when a saved field changes, and never written again.

One was: Diffusion's text encoder looked for another end token than its tokenizer writes, which is refused now; the
token and the actions are those of a sound checkpoint.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from manipulators.processing.pi0 import PI0PolicyProcessor

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("*/config.json"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    """One checkpoint as an earlier version wrote it."""
    return request.param


def test_all_first_policies_are_there():
    assert [folder.name for folder in FOLDERS] == ["act", "diffusion", "gr00t_n1", "gr00t_n1_5", "pi0"]


def test_gives_the_same_actions(folder):
    from manipulators import PolicyPipeline

    example = load_file(folder / "example.safetensors")
    observation = {n.split("/")[1]: x for n, x in example.items() if n.startswith("observation/")}
    draws = {n.split("/")[1]: x for n, x in example.items() if n.startswith("draw/")}
    pipeline = PolicyPipeline.from_pretrained(folder, device="cpu")
    actions = pipeline.predict_chunk(observation, task="push the red button", **draws)
    torch.testing.assert_close(actions, example["actions"], atol=2e-5, rtol=1e-5)


def test_saved_again_it_is_the_same_checkpoint(folder, tmp_path):
    from manipulators import PolicyPipeline

    PolicyPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_class_name_that_transformers_took_is_read_here_and_never_half():
    """transformers finds its own processor by the name that 0.1.0 wrote, which asks for files that are not there."""
    folder = Path(__file__).parent / "pi0"
    assert type(PI0PolicyProcessor.from_pretrained(folder)) is PI0PolicyProcessor
    with pytest.raises(OSError, match="image processor"):
        AutoProcessor.from_pretrained(folder)
