"""Wrong values in the parts of a config that transformers describes are refused by this library's errors."""

import runpy
from pathlib import Path

import pytest

from manipulators import AutoPolicy
from manipulators.errors import InvalidConfigError

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))
GEMMA, SIGLIP, RESNET, CLIP = (CASES[name] for name in ("GEMMA", "SIGLIP", "RESNET", "CLIP_TEXT"))
WRONG = [
    ("tiny_pi0", {"paligemma_config": {"text_config": GEMMA | {"hidden_size": "32"}, "vision_config": SIGLIP}}),
    ("tiny_pi0", {"paligemma_config": {"text_config": GEMMA | {"num_hidden_layers": None}, "vision_config": SIGLIP}}),
    ("tiny_pi0", {"paligemma_config": {"text_config": GEMMA, "vision_config": 3}}),
    ("tiny_pi0", {"paligemma_config": {"text_config": [], "vision_config": SIGLIP}}),
    ("tiny_pi0", {"gemma_expert_config": GEMMA | {"num_attention_heads": 2.5}}),
    ("tiny_gr00t_n1_5", {"backbone_cfg": {"select_layer": "1"}}),
    ("tiny_gr00t_n1_5", {"eagle_config": {"vision_config": SIGLIP | {"hidden_size": "24"}, "text_config": GEMMA}}),
    ("tiny_act", {"vision_config": {"layer_type": 3}}),
    ("tiny_act", {"vision_config": RESNET | {"hidden_sizes": "ab"}}),
    ("tiny_act", {"vision_config": RESNET | {"depths": None}}),
    ("tiny_diffusion", {"vision_config": RESNET | {"hidden_sizes": 3}}),
    ("tiny_diffusion", CASES["LANGUAGE"] | {"language_config": 3}),
    ("tiny_diffusion", CASES["LANGUAGE"] | {"language_config": {"text_config": 3}}),
    ("tiny_diffusion", CASES["LANGUAGE"] | {"language_config": CLIP | {"hidden_size": "16"}}),
    ("tiny_diffusion", CASES["LANGUAGE"] | {"language_config": CLIP | {"num_attention_heads": 0}}),
]


@pytest.mark.parametrize(("family", "fields"), WRONG)
def test_wrong_value(family, fields):
    with pytest.raises(InvalidConfigError):
        AutoPolicy.from_config(CASES[family](CASES["TWO_CAMERAS"], **fields))


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), -100.0])
def test_weights_of_an_average_that_are_no_numbers(tiny_act, coefficient):
    with pytest.raises(InvalidConfigError, match="gives no finite weights for 5 steps"):
        tiny_act(n_action_steps=1, temporal_ensemble_coeff=coefficient)
