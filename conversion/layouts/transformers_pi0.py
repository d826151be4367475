"""transformers' own π0 as its `save_pretrained` writes it: model type `pi0`, statistics in processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._files import read_json
from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.features import ACTION, STATE
from ...configuration.pi0 import PI0PolicyConfig
from ...configuration.strict import completed
from ...errors import InvalidConfigError
from ...modeling.loading import read_weights
from ...modeling.policies.pi0 import PI0Policy
from ...processing.pi0 import PI0PolicyProcessor
from ..pi0 import rename_pi0_weights
from ..published_policy import build_policy, require_known

# Fields that its config has beside those of ours. Over what its loss is reduced changes no action.
FIELDS = ("vlm_config", "dit_config", "loss_reduction")
# transformers' name of a vector's statistics → our name of the feature.
STATISTICS = {"state": STATE, "actions": ACTION}
# What else it writes of its processor: its class, its parts, which are PaliGemma's, and the length of an instruction.
PROCESSOR = ("processor_class", "auto_map", "image_processor", "tokenizer", "max_state_dim", "chunk_size")


def is_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of transformers' own π0, by its model type."""
    return config.get("model_type") == "pi0"


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    loading: Mapping[str, Any],
    processor_fields: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    **overrides: Any,
) -> tuple[Any, PI0PolicyProcessor | None]:
    """Load policy and processor from a folder as transformers writes it.

    Args:
        checkpoint: with config.json and weights, and for the processor processor_config.json.
        loading: how the policy is loaded; its dtype is by default the one it was saved in.
        processor_fields: fields of our processor to override.
        tokenizer: PaliGemma's, see `LanguageProcessor.from_config`. The one saved by transformers leaves out <bos>.
        with_processor: leave the processor out when False.
        overrides: fields of our config; `input_features` and `output_features`, which transformers does not record.

    Raises:
        InvalidConfigError: the features are not given.
        MissingFileError, CorruptFileError, WeightsMismatchError, MissingStatisticsError.
    """
    if not {"input_features", "output_features"} <= overrides.keys():
        raise InvalidConfigError(
            f"{checkpoint.source} is transformers' π0, whose config.json names neither cameras nor the widths of "
            f"state and actions. Pass input_features={{'observation.images.<camera>': …, 'observation.state': …}} and "
            f"output_features={{'action': …}}."
        )
    config = checkpoint.config
    require_known("config.json", config, [*FIELDS, *(name for name in config if PI0PolicyConfig.knows(name))])
    for name in ("vlm_config", "dit_config"):
        if not isinstance(config.get(name), Mapping):
            raise InvalidConfigError(f"config.json has {name}={config.get(name)!r}; its sizes stand there.")
    fields = {name: value for name, value in config.items() if name in PI0PolicyConfig.field_names()}
    vision = config["vlm_config"].get("vision_config")
    size = vision.get("image_size") if isinstance(vision, Mapping) else None
    if not isinstance(size, int):
        raise InvalidConfigError(f"config.json has vlm_config.vision_config={vision!r}, without the size of pictures.")
    fields |= {
        "paligemma_config": config["vlm_config"],
        "gemma_expert_config": config["dit_config"],
        "image_resolution": (size, size),
    }
    policy_config = PI0PolicyConfig.from_dict(fields, **overrides)
    weights = rename_pi0_weights(read_weights(checkpoint.folder, checkpoint.variant))
    policy = build_policy(PI0Policy, policy_config, weights, checkpoint, loading, config.get("dtype"))
    if not with_processor:
        return policy, None
    own = completed({"statistics": _read_statistics(checkpoint.folder)}, processor_fields or {})
    return policy, PI0PolicyProcessor.from_config(policy_config, tokenizer=tokenizer, **own)


def _policy_class(checkpoint: Checkpoint) -> type[PI0Policy]:
    return PI0Policy


def _read_statistics(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return what processor_config.json holds of means and standard deviations, under our names."""
    path = folder / "processor_config.json"
    saved = read_json(path) if path.is_file() else {}
    kinds = [f"{theirs}_{which}" for theirs in STATISTICS for which in ("mean", "std")]
    require_known(path.name, saved, [*kinds, *PROCESSOR])
    statistics: dict[str, dict[str, list[float]]] = {}
    for theirs, ours in STATISTICS.items():
        for which in ("mean", "std"):
            if saved.get(f"{theirs}_{which}") is not None:
                statistics.setdefault(ours, {})[which] = saved[f"{theirs}_{which}"]
    return statistics


register_layout(Layout(name="transformers' π0", matches=is_config, policy_class=_policy_class, read=read_checkpoint))
