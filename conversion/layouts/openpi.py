"""π0 as openpi's converter to PyTorch writes it: config.json, one file of weights, statistics among its assets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._files import read_json
from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.features import ACTION, IMAGE_PREFIX, STATE
from ...configuration.pi0 import PI0PolicyConfig
from ...configuration.strict import completed
from ...errors import CheckpointError, CorruptFileError, MissingFileError
from ...modeling.loading import read_weights
from ...modeling.policies.pi0 import PI0Policy
from ...processing.pi0 import PI0PolicyProcessor
from ..pi0 import rename_pi0_weights, variant_fields
from ..published_policy import build_policy, require_known

# What openpi calls its three cameras, in the network's order; a robot without wrist cameras lacks the others.
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STATISTICS = "norm_stats.json"
# What its converter writes into config.json, and the statistics of a feature.
FIELDS = ("action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision")
WHICH = ("mean", "std", "q01", "q99")
# openpi's name of a feature → ours.
FEATURES = {"state": STATE, "actions": ACTION}


def is_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is openpi's, by its fields: it names no type of policy."""
    return {"action_dim", "action_horizon", "paligemma_variant"} <= config.keys() and not {"type", "model_type"} & (
        config.keys()
    )


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    loading: Mapping[str, Any],
    processor_fields: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    asset_id: str | None = None,
    **overrides: Any,
) -> tuple[Any, PI0PolicyProcessor | None]:
    """Load policy and processor from a folder as openpi's converter writes it.

    What openpi does to one robot's numbers in code, such as actions relative to the state, is no part of a checkpoint:
    say it by the processor's `relative_to`.

    Args:
        checkpoint: with config.json, weights and assets/<robot>/norm_stats.json.
        loading: how the policy is loaded; its dtype is by default the config's `precision`.
        processor_fields: fields of our processor to override.
        tokenizer: PaliGemma's, see `LanguageProcessor.from_config`.
        with_processor: leave the processor out when False.
        asset_id: whose statistics, where the assets hold several robots'.
        overrides: fields of our config.

    Raises:
        MissingFileError, CorruptFileError, CheckpointError, WeightsMismatchError.
    """
    config = checkpoint.config
    require_known("config.json", config, FIELDS)
    statistics = _read_statistics(checkpoint.folder, asset_id)
    widths = {name: len(values["mean"]) for name, values in statistics.items()}
    picture = (3, *overrides.get("image_resolution", (224, 224)))
    fields = variant_fields(config) | {
        "chunk_size": config["action_horizon"],
        "max_state_dim": config["action_dim"],
        "max_action_dim": config["action_dim"],
        "input_features": {
            **{IMAGE_PREFIX + camera: {"type": "VISUAL", "shape": picture} for camera in CAMERAS},
            STATE: {"type": "STATE", "shape": (widths[STATE],)},
        },
        "output_features": {ACTION: {"type": "ACTION", "shape": (widths[ACTION],)}},
        "optional_cameras": [IMAGE_PREFIX + camera for camera in CAMERAS[1:]],
    }
    policy_config = PI0PolicyConfig.from_dict(fields, **overrides)
    weights = rename_pi0_weights(read_weights(checkpoint.folder, checkpoint.variant))
    policy = build_policy(PI0Policy, policy_config, weights, checkpoint, loading, config.get("precision"))
    if not with_processor:
        return policy, None
    published = {"statistics": statistics, "normalization_eps": 1e-6, "clean_instructions": True}
    fields = completed(published, processor_fields or {})
    return policy, PI0PolicyProcessor.from_config(policy_config, tokenizer=tokenizer, **fields)


def _policy_class(config: Mapping[str, Any]) -> type[PI0Policy]:
    return PI0Policy


def _files(folder: Path) -> list[str]:
    return [f"assets/*{STATISTICS}"]


def _read_statistics(folder: Path, asset_id: str | None) -> dict[str, dict[str, list[float]]]:
    """Return the statistics of state and actions under our names."""
    assets = folder / "assets"
    found = {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.glob(f"**/{STATISTICS}"))}
    if not found:
        raise MissingFileError(
            f"{folder} holds no assets/<robot>/{STATISTICS}. Copy the assets folder of openpi's own checkpoint beside "
            f"the weights: without statistics a policy's actions mean nothing."
        )
    if asset_id is None and len(found) == 1:
        (asset_id,) = found
    if asset_id not in found:
        chosen = "none is chosen" if asset_id is None else f"there is no {asset_id!r}"
        raise CheckpointError(
            f"{folder} holds the statistics of {', '.join(found)}, and {chosen}. "
            f"Choose one: asset_id={next(iter(found))!r}"
        )
    path = found[asset_id]
    content = read_json(path)
    require_known(path.name, content, ["norm_stats"])
    statistics = content.get("norm_stats")
    if not isinstance(statistics, dict) or not all(
        isinstance(statistics.get(name), dict) and isinstance(statistics[name].get("mean"), list) for name in FEATURES
    ):
        raise CorruptFileError(path, "file of statistics", f"norm_stats must hold {' and '.join(FEATURES)}")
    require_known(path.name, statistics, FEATURES)
    for name in FEATURES:
        require_known(f"{path.name}: {name}", statistics[name], WHICH)
    return {
        ours: {which: values for which, values in statistics[theirs].items() if values is not None}
        for theirs, ours in FEATURES.items()
    }


register_layout(
    Layout(
        name="openpi",
        matches=is_config,
        policy_class=_policy_class,
        read=read_checkpoint,
        files=_files,
        arguments=("asset_id",),
    )
)
