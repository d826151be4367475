"""LeRobot's π0 or π0.5, served to pi0.py from an interpreter of its own: its transformers is below 5.6, ours above.

    python benchmarks/pi0_lerobot.py FOLDER

Reads `sizes.json` and `inputs.safetensors` from the folder and writes `weights.safetensors`. Then each line of the
input names a call, `sample`, `loss`, `train` or `compile`: it is run once and its seconds are printed; what the first
two return is written to `<call>.safetensors`. LeRobot knows the published sizes only, so its variants are replaced
here, and its projector and vocabulary made as small as asked for.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig


def build(sizes: dict[str, Any], make: Callable[[], nn.Module], modeling: ModuleType = modeling_pi0) -> nn.Module:
    """Return LeRobot's π0 at the given sizes, in float32.

    Args:
        sizes: of `text`, `expert` and `vision`.
        make: builds the network, or a policy around it, at the sizes that LeRobot knows.
        modeling: its module, whose variants are replaced meanwhile.
    """
    text, expert, vision = sizes["text"], sizes["expert"], sizes["vision"]
    originals = modeling.get_gemma_config, modeling.CONFIG_MAPPING

    def variant(name: str) -> Any:
        chosen = text if name == "gemma_2b" else expert
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        return modeling.GemmaConfig(*(chosen[n] for n in names), chosen["num_key_value_heads"], chosen["head_dim"])

    modeling.get_gemma_config = variant
    modeling.CONFIG_MAPPING = {
        "gemma": originals[1]["gemma"],
        "paligemma": lambda: PaliGemmaConfig(
            text_config=GemmaConfig(**text), vision_config=SiglipVisionConfig(**vision)
        ),
    }
    try:
        made = make()
    finally:
        modeling.get_gemma_config, modeling.CONFIG_MAPPING = originals
    backbone, width = getattr(made, "model", made).paligemma_with_expert, text["hidden_size"]
    paligemma = backbone.paligemma
    paligemma.model.multi_modal_projector.linear = nn.Linear(vision["hidden_size"], width)
    paligemma.model.language_model.embed_tokens.weight = nn.Parameter(0.02 * torch.randn(text["vocab_size"], width))
    paligemma.lm_head = nn.Linear(width, text["vocab_size"], bias=False)
    backbone.gemma_expert.lm_head = nn.Linear(expert["hidden_size"], expert["vocab_size"], bias=False)
    backbone._set_requires_grad()  # what was frozen and has been replaced is frozen again
    return made


# Policy → its module, how its network is built, and its config's class.
POLICIES = {
    "pi0": (modeling_pi0, "PI0Pytorch", PI0Config),
    "pi05": (modeling_pi05, "PI05Pytorch", PI05Config),
}


def calls(
    network: nn.Module, config_class: type, inputs: dict[str, torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what can be asked for: a chunk of one observation, and a batch's loss and training step."""

    def observation(batch: int) -> list[Any]:
        return [
            [picture[:batch] for picture in inputs["pixel_values"].unbind(1)],
            [torch.ones(batch, dtype=torch.bool)] * inputs["pixel_values"].shape[1],
            inputs["input_ids"][:batch],
            inputs["attention_mask"][:batch].bool(),
            *([inputs["state"][:batch]] if config_class is PI0Config else []),
        ]

    batch = len(inputs["state"])
    preset = config_class(device="cpu").get_optimizer_preset()
    optimizer = preset.build(network.parameters())

    def sample() -> torch.Tensor:
        return network.eval().sample_actions(*observation(1), noise=inputs["noise"][:1].clone())

    def loss() -> torch.Tensor:
        return network.train()(
            *observation(batch), actions=inputs["actions"], noise=inputs["noise"], time=inputs["time"]
        ).mean()

    def train() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def compile_() -> None:  # as its `compile_model=True` does, with torch's default mode
        network.sample_actions = torch.compile(network.sample_actions)

    return {"sample": sample, "loss": loss, "train": train, "compile": compile_}


def main() -> None:
    """Build the network and answer calls until the input ends."""
    folder = Path(sys.argv[1])
    sizes = json.loads((folder / "sizes.json").read_text())
    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    modeling, network_class, config_class = POLICIES[sizes["policy"]]
    network = build(sizes, lambda: getattr(modeling, network_class)(config_class(device="cpu")), modeling)
    save_file(
        {name: value.detach().clone() for name, value in network.state_dict().items()}, folder / "weights.safetensors"
    )
    known = calls(network, config_class, load_file(folder / "inputs.safetensors"))
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        result = known[name]()
        seconds = time.perf_counter() - start
        if result is not None:
            save_file({"result": result.detach().clone()}, folder / f"{name}.safetensors")
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
