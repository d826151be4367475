"""π0 and π0.5 as openpi's converter to PyTorch writes them: config.json, weights, statistics among the assets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..._files import read_json
from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.features import ACTION, IMAGE_PREFIX, STATE
from ...configuration.strict import completed
from ...errors import CheckpointError, CorruptFileError, MissingFileError, MissingStatisticsError
from ...modeling.loading import read_shapes, read_weights, weight_files
from ...modeling.policies.pi0 import PI0Policy
from ...processing.pi0 import PI0PolicyProcessor
from ...processing.registry import processor_class
from ..pi0 import PI0, variant_fields
from ..pi05 import PI05
from ..published_policy import PublishedPolicy, build_policy, require_known

logger = logging.get_logger(__name__)

# What openpi calls its three cameras, in the network's order; a robot without wrist cameras lacks the others.
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STATISTICS = "norm_stats.json"
# What its converter writes into config.json, and the statistics of a feature.
FIELDS = ("action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision")
WHICH = ("mean", "std", "q01", "q99")
# openpi's name of a feature → ours.
FEATURES = {"state": STATE, "actions": ACTION}
# What openpi adds to a standard deviation, and to the range between two quantiles, before it divides by it.
EPS = 1e-6
# A layer that π0.5 alone has: config.json does not say which of the two a checkpoint is.
PI05_LAYER = "time_mlp_in.weight"


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
    say it by the processor's `relative_to`. Whether π0.5's prompt tells the state is not either: `prompt_state_dim`.

    Args:
        checkpoint: with config.json, weights and assets/<robot>/norm_stats.json, unless `processor_fields` has
            `statistics`.
        loading: how the policy is loaded; its dtype is by default the config's `precision`.
        processor_fields: fields of our processor to override.
        tokenizer: PaliGemma's, see `LanguageProcessor.from_config`.
        with_processor: leave the processor out when False.
        asset_id: whose statistics, where the assets hold several robots'.
        overrides: fields of our config.

    Raises:
        MissingFileError, CorruptFileError, CheckpointError, WeightsMismatchError.
    """
    config, kind = checkpoint.config, _published(checkpoint)
    require_known("config.json", config, FIELDS)
    given = dict(processor_fields or {})
    if not given.get("statistics") or _found_statistics(checkpoint.folder):
        given = completed({"statistics": _read_statistics(checkpoint.folder, asset_id)}, given)
    statistics = given.pop("statistics")
    widths = {name: _width(name, statistics) for name in FEATURES.values()}
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
    published = {"normalization_eps": EPS}
    if kind is PI0:
        published["clean_instructions"] = True
    elif all(statistics[name].get(which) is not None for name in widths for which in ("q01", "q99")):
        published = {}
        statistics = statistics | {name: _with_wider_range(statistics[name]) for name in widths}
    else:
        fields["normalization_mapping"] = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "IDENTITY"}
    if kind is PI05 and "prompt_state_dim" not in overrides:
        logger.warning(
            f"{checkpoint.source}: openpi's files do not say whether the prompt of π0.5 tells the state. Here it "
            f"does; for a policy that was trained without, such as pi05_libero: prompt_state_dim=0. If it is right as "
            f"it is: prompt_state_dim=None."
        )
    policy_config = kind.policy_class.config_class.from_dict(fields, **overrides)
    weights = kind.rename(read_weights(checkpoint.folder, checkpoint.variant))
    policy = build_policy(kind.policy_class, policy_config, weights, checkpoint, loading, config.get("precision"))
    if not with_processor:
        return policy, None
    own = completed(published, given)
    return policy, processor_class(policy_config).from_config(policy_config, statistics, tokenizer=tokenizer, **own)


def _published(checkpoint: Checkpoint) -> PublishedPolicy:
    """Return which of the two policies a checkpoint holds."""
    names = read_shapes(weight_files(checkpoint.folder, checkpoint.variant))
    return PI05 if any(name in (PI05_LAYER, f"model.{PI05_LAYER}") for name in names) else PI0


def _policy_class(checkpoint: Checkpoint) -> type[PI0Policy]:
    return _published(checkpoint).policy_class


def _files(folder: Path) -> list[str]:
    return [f"assets/*{STATISTICS}"]


def _width(name: str, statistics: Mapping[str, Any]) -> int:
    """Return how wide a feature is by its statistics."""
    values = [value for value in (statistics.get(name) or {}).values() if value is not None]
    if not values:
        raise MissingStatisticsError(
            f"statistics= holds {', '.join(statistics) or 'nothing'}; a policy of openpi needs those of {name}."
        )
    return len(values[0])


def _with_wider_range(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return statistics whose 99th percentile is higher by what openpi adds to the range, also of what never moved."""
    return dict(statistics) | {"q99": [float(value) + EPS for value in statistics["q99"]]}


def _found_statistics(folder: Path) -> dict[str, Path]:
    """Return the robots whose statistics are among the assets, and their files."""
    assets = folder / "assets"
    return {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.glob(f"**/{STATISTICS}"))}


def _read_statistics(folder: Path, asset_id: str | None) -> dict[str, dict[str, list[float]]]:
    """Return the statistics of state and actions under our names."""
    found = _found_statistics(folder)
    if not found:
        raise MissingFileError(
            f"{folder} holds no assets/<robot>/{STATISTICS}. Copy the assets folder of openpi's own checkpoint beside "
            f"the weights, or pass statistics= of your dataset: without statistics a policy's actions mean nothing."
        )
    if asset_id is None and len(found) == 1:
        (asset_id,) = found
    if asset_id not in found:
        chosen = "none is chosen" if asset_id is None else f"there is no {asset_id!r}"
        raise CheckpointError(
            f"{folder} holds the statistics of {', '.join(found)}, and {chosen}. "
            f"Choose one: asset_id={next(iter(found))!r}"
        )
    return read_norm_stats(found[asset_id])


def read_norm_stats(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return the statistics in a norm_stats.json under our names.

    Raises:
        CorruptFileError, InvalidConfigError: it holds something else, or more.
    """
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
