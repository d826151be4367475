"""transformers' own π0 as its `save_pretrained` writes it: model type `pi0`, statistics in processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._files import read_json
from ..configuration.features import ACTION, STATE
from ..configuration.pi0 import PI0PolicyConfig
from ..errors import InvalidConfigError
from ..modeling.policies.pi0 import PI0Policy
from ..processing.pi0 import PI0PolicyProcessor
from .pi0 import rename_pi0_weights
from .published_policy import build_policy, read_weights

# transformers' name of a vector's statistics → our name of the feature.
STATISTICS = {"state": STATE, "actions": ACTION}


def is_config(config: Mapping[str, Any]) -> bool:
    """Tell transformers' config.json by its model type."""
    return config.get("model_type") == "pi0"


def read_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    source: str,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    **overrides: Any,
) -> tuple[PI0Policy, PI0PolicyProcessor | None]:
    """Load policy and processor from a folder as transformers writes it.

    Args:
        folder: with config.json and model.safetensors, and for the processor processor_config.json.
        config: the parsed config.json.
        source: for messages.
        dtype: of the weights; by default as saved.
        tokenizer: PaliGemma's, see `LanguageProcessor.from_config`. The one saved by transformers leaves out <bos>.
        with_processor: leave the processor out when False.
        overrides: fields of our config; `input_features` and `output_features`, which transformers does not record.

    Raises:
        InvalidConfigError: the features are not given.
        MissingFileError, CorruptFileError, WeightsMismatchError, MissingStatisticsError.
    """
    if not {"input_features", "output_features"} <= overrides.keys():
        raise InvalidConfigError(
            f"{source} is transformers' π0, whose config.json names neither cameras nor the widths of state and "
            f"actions. Pass input_features={{'observation.images.<camera>': …, 'observation.state': …}} and "
            f"output_features={{'action': …}}."
        )
    fields = {name: value for name, value in config.items() if name in PI0PolicyConfig.field_names()}
    size = config["vlm_config"]["vision_config"]["image_size"]
    fields |= {
        "paligemma_config": config["vlm_config"],
        "gemma_expert_config": config["dit_config"],
        "image_resolution": (size, size),
    }
    policy_config = PI0PolicyConfig.from_dict(fields, **overrides)
    weights = rename_pi0_weights(read_weights(folder / "model.safetensors"))
    policy = build_policy(PI0Policy, policy_config, weights, source, dtype or config.get("dtype"))
    if not with_processor:
        return policy, None
    return policy, PI0PolicyProcessor.from_config(policy_config, _read_statistics(folder), tokenizer=tokenizer)


def _read_statistics(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return what processor_config.json holds of means and standard deviations, under our names."""
    path = folder / "processor_config.json"
    saved = read_json(path) if path.is_file() else {}
    statistics: dict[str, dict[str, list[float]]] = {}
    for theirs, ours in STATISTICS.items():
        for which in ("mean", "std"):
            if saved.get(f"{theirs}_{which}") is not None:
                statistics.setdefault(ours, {})[which] = saved[f"{theirs}_{which}"]
    return statistics
