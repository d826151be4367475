"""The usage blocks of InternManip's document run as printed; only their import lines name another package."""

import re

import pytest
import torch

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def blocks(shared):
    """Return a function: component → the code blocks of its section."""
    text = (shared / "specs" / "internmanip_model_document.md").read_text(encoding="utf-8")

    def of(component: str) -> list[str]:
        (section,) = re.findall(rf"^### {component}\n(.*?)(?=^#{{2,3}} |\Z)", text, re.DOTALL | re.MULTILINE)
        found = BLOCK.findall(section.split("<!--")[0])
        rewritten = [
            re.sub(r"^from internmanip\.\S+ import", "from manipulators import", b, flags=re.M) for b in found
        ]
        assert not any("internmanip" in block for block in rewritten)
        return rewritten

    return of


def test_act_backbone(blocks):
    initialization, forward = blocks("ACTBackbone")
    scope = {"torch": torch, "batch_size": 2}
    exec(initialization, scope)
    exec(forward, scope)
    assert scope["encoder_out"].shape == (3, 2, 256)  # latent, state, environment state


def test_act_action_head(blocks):
    initialization, forward, inference = blocks("ACTActionHead")
    scope = {"torch": torch, "batch_size": 2, "seq_len": 7, "device": "cpu"}
    exec(blocks("ACTBackbone")[0], scope)  # the inference block uses the backbone of the section before
    exec(initialization, scope)
    exec(forward, scope)
    assert scope["latent_sample"].shape == (2, 64) and scope["mu"] is None and scope["log_sigma_x2"] is None
    assert scope["actions"].shape == (2, 16, 8)
    del scope["actions"]
    exec(inference, scope)
    assert torch.equal(scope["latent_sample"], torch.zeros(2, 64))
    assert scope["encoder_out"].shape == (3, 2, 256)
    assert scope["actions"].shape == (2, 16, 8)
