"""What is special about π0.5 beside π0."""

import runpy
from pathlib import Path

import pytest
import torch

from manipulators import PI05Policy
from manipulators.training.tuning import lora_modules

TESTS = Path(__file__).parents[1]
tiny_pi05 = runpy.run_path(str(TESTS / "policy_cases.py"))["tiny_pi05"]
operators_per_step = runpy.run_path(str(TESTS / "modeling" / "test_pi0.py"))["operators_per_step"]


# LeRobot's (0.6.1) takes 1004 on the same layout.
@pytest.mark.parametrize(("fused", "limit"), [(False, 550), (True, 478)])
def test_operators_per_denoising_step(fused, limit):
    """On the published layout, 18 layers: the modulations of all steps are computed before the first."""
    gemma = tiny_pi05().paligemma_config["text_config"] | {
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    }
    paligemma = tiny_pi05().paligemma_config | {"text_config": gemma}
    expert = gemma | {"hidden_size": 16}
    policy = PI05Policy(tiny_pi05(paligemma_config=paligemma, gemma_expert_config=expert)).eval()
    if fused:
        policy.fuse()
    step = operators_per_step(policy)
    assert step["addmm"] == 2 and step["silu"] == step["cos"] == 0  # actions in and out
    assert step.total() <= limit, step


def test_bfloat16_keeps_what_must_be_exact(tmp_path):
    """As LeRobot: pictures, PaliGemma's norms, modulations and projections stay in float32."""
    torch.manual_seed(0)
    policy = PI05Policy(tiny_pi05()).eval()
    inputs, given = policy.config.example_inputs(2), policy.config.example_draws(2)
    policy.save_pretrained(tmp_path)
    loaded = PI05Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half = {name for name, p in loaded.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {
        name
        for name, _ in policy.named_parameters()
        if "embed_tokens" in name or ("layers." in name and "_proj" in name and "vision_tower" not in name)
    }
    found = loaded.predict_action_chunk(**inputs, **given)
    assert found.dtype == torch.float32
    assert 0 < (found - policy.predict_action_chunk(**inputs, **given)).abs().max() < 0.1


def test_adapters_reach_the_layers_that_the_time_modulates():
    """LeRobot's pattern misses them; the layers of the time itself are trained whole."""
    policy = PI05Policy(tiny_pi05())
    adapted = lora_modules(policy, "tune_diffusion_model")
    modulation = "model.paligemma_with_expert.expert_modulation."
    norms = [f"layers.{i}.{kind}_layernorm" for i in range(2) for kind in ("input", "post_attention")]
    assert {name for name in adapted if name.startswith(modulation)} == {modulation + n for n in (*norms, "norm")}
    assert len(adapted) == 2 * 7 + 5
    assert policy.modules_to_save == tuple(
        f"model.{name}" for name in ("action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj")
    )
