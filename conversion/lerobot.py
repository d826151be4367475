"""LeRobot's checkpoints: flat config.json, `model.` weights, statistics beside them (0.4 and later) or among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from .._files import read_json
from ..configuration.act import ACTConfig
from ..configuration.features import ACTION, STATE, FeatureType, NormalizationMode, PolicyFeature
from ..configuration.policy import PolicyConfig
from ..configuration.resnet import RESNETS
from ..errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    MissingStatisticsError,
    UnknownPolicyError,
    WeightsMismatchError,
    nearest,
)
from ..modeling.policies.act import ACTPolicy
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor

logger = logging.get_logger(__name__)

# Where LeRobot 0.1 to 0.3 keep statistics: modules of the policy itself.
OLD_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
POLICIES: dict[str, type[PolicyModel]] = {"act": ACTPolicy}


def is_config(config: Mapping[str, Any]) -> bool:
    """Tell LeRobot's config.json by its `type`, which ours calls `model_type`."""
    return "type" in config and "model_type" not in config


def read_checkpoint(
    folder: Path, config: Mapping[str, Any], source: str, dtype: torch.dtype | str = torch.float32, **overrides: Any
) -> tuple[PolicyModel, PolicyProcessor]:
    """Load policy and processor from a folder as LeRobot publishes it.

    Args:
        folder: with config.json, model.safetensors and the two processors.
        config: the parsed config.json.
        source: for messages.
        dtype: of the weights; LeRobot runs them in float32, whatever the file holds.
        overrides: fields of our config.

    Raises:
        UnknownPolicyError, MissingFileError, CorruptFileError, WeightsMismatchError, MissingStatisticsError.
    """
    if config["type"] not in POLICIES:
        raise UnknownPolicyError(
            f"{source} is a LeRobot policy of type {config['type']!r}. {nearest(config['type'], POLICIES)}"
        )
    for kind in ("input_features", "output_features"):
        if not isinstance(config.get(kind), Mapping):
            raise InvalidConfigError(f"The config.json of {source} has no {kind}; published ones list them all.")
    policy_class = POLICIES[config["type"]]
    published = _read_weights(folder / "model.safetensors")
    statistics_inside = {name for name in published if name.startswith(OLD_NORMALIZERS)}
    if statistics_inside:
        normalizer = unnormalizer = _normalizer_inside(config, {n: published.pop(n) for n in statistics_inside})
        rename_map: dict[str, str] = {}
    else:
        normalizer, unnormalizer, rename_map = _read_processors(folder)
    weights = rename_act_weights(published)
    fields = act_fields(config, weights)
    fields["normalization_mapping"] = {
        kind: normalizer["norm_map"].get(kind, "IDENTITY") for kind in FeatureType.__members__
    }
    policy_config = policy_class.config_class.from_dict(fields, **overrides)
    policy = policy_class.from_pretrained(None, config=policy_config, state_dict=weights, dtype=dtype)
    policy.config.name_or_path = source
    return policy, _build_processor(policy_config, normalizer, unnormalizer, rename_map, source)


# --- configuration ----------------------------------------------------------------------------------------


def act_fields(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the fields of `ACTConfig` for LeRobot's config; what only its training script reads is left out."""
    fields = {name: value for name, value in config.items() if name in ACTConfig.field_names()}
    fields["input_features"] = _read_inputs(config["input_features"])
    fields["pretrained_backbone_weights"] = None  # the trained ones are in the checkpoint
    if "vision_backbone" in fields:
        fields["vision_config"] = _resnet_fields(fields["vision_backbone"], weights)
    left_out = sorted(set(config) - set(fields))
    logger.info(f"Fields of the published config.json that this library does not use: {', '.join(left_out)}")
    return fields


def _read_inputs(features: Mapping[str, Mapping]) -> dict[str, PolicyFeature]:
    inputs = {name: PolicyFeature.from_value(dict(value)) for name, value in features.items()}
    # LeRobot reads one STATE feature, by its name; others of that type are listed and never used.
    return {n: f for n, f in inputs.items() if f.type is not FeatureType.STATE or n == STATE}


def _resnet_fields(name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """Read the ResNet's sizes off its weights: the published config only names it."""
    trunk = "backbone.image_encoder."
    stem = weights.get(trunk + "embedder.embedder.convolution.weight")
    if stem is None:
        return None
    blocks = re.compile(re.escape(trunk) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight")
    shapes = {tuple(map(int, m.groups())): w.shape[0] for n, w in weights.items() if (m := blocks.fullmatch(n))}
    stages = sorted({stage for stage, _, _ in shapes})
    sizes = {
        "layer_type": "bottleneck" if any(conv == 2 for _, _, conv in shapes) else "basic",
        # The widest convolution of a stage is its last, whatever the kind of layer.
        "hidden_sizes": [max(width for (s, _, _), width in shapes.items() if s == stage) for stage in stages],
        "depths": [max(block for s, block, _ in shapes if s == stage) + 1 for stage in stages],
        "embedding_size": stem.shape[0],
        "num_channels": stem.shape[1],
    }
    usual = {"embedding_size": 64, "num_channels": 3} | RESNETS.get(name, {})
    differing = {field: value for field, value in sizes.items() if usual.get(field) != value}
    return differing or None


# --- weights ----------------------------------------------------------------------------------------------


def _stage_block(match: re.Match) -> str:
    layer, block, kind, number = match.groups()
    part = "convolution" if kind == "conv" else "normalization"
    return f"backbone.image_encoder.encoder.stages.{int(layer) - 1}.layers.{block}.layer.{int(number) - 1}.{part}."


def _stage_shortcut(match: re.Match) -> str:
    layer, block, number = match.groups()
    part = "convolution" if number == "0" else "normalization"
    return f"backbone.image_encoder.encoder.stages.{int(layer) - 1}.layers.{block}.shortcut.{part}."


# Published name → ours. First the ResNet (torchvision's names → transformers'), then which part owns the rest.
ACT_RENAMES: list[tuple[str, Any]] = [
    (r"^model\.backbone\.conv1\.", "backbone.image_encoder.embedder.embedder.convolution."),
    (r"^model\.backbone\.bn1\.", "backbone.image_encoder.embedder.embedder.normalization."),
    (r"^model\.backbone\.layer(\d)\.(\d+)\.(conv|bn)(\d)\.", _stage_block),
    (r"^model\.backbone\.layer(\d)\.(\d+)\.downsample\.(\d)\.", _stage_shortcut),
    (r"^model\.(encoder[._])", r"backbone.\1"),
    (r"^model\.(vae_encoder|decoder|action_head)", r"action_head.\1"),
]


def rename_act_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return LeRobot's ACT weights under our names; other names stay as they are."""
    renamed = {}
    for name, value in state_dict.items():
        name = name.replace("_orig_mod.", "")  # left in the names by torch.compile
        for pattern, replacement in ACT_RENAMES:
            new, count = re.subn(pattern, replacement, name)
            if count:
                name = new
                break
        renamed[name] = value
    return renamed


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; it holds {_listing(path.parent)}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(path, "safetensors file", error) from error


# --- processors -------------------------------------------------------------------------------------------


def _read_processors(folder: Path) -> tuple[dict, dict, dict[str, str]]:
    """Return normalizer and unnormalizer (their config and `statistics`) and the map of renamed observations."""
    if not (folder / PREPROCESSOR).is_file() or not (folder / POSTPROCESSOR).is_file():
        raise MissingFileError(
            f"{folder} holds no {PREPROCESSOR} and {POSTPROCESSOR}, where LeRobot 0.4 and later keep the "
            f"statistics, nor are there any among the weights, as in 0.1 to 0.3; it holds {_listing(folder)}. "
            f"Without statistics a policy's actions mean nothing."
        )
    before, after = _read_steps(folder / PREPROCESSOR), _read_steps(folder / POSTPROCESSOR)
    renames = [step["config"].get("rename_map", {}) for step in before if "rename" in step["registry_name"]]
    rename_map = {old: new for renamed in renames for old, new in renamed.items()}
    return _normalizer(folder, before, "normalizer"), _normalizer(folder, after, "unnormalizer"), rename_map


def _read_steps(path: Path) -> list[dict]:
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("registry_name"), str) and isinstance(step.get("config"), dict)
        for step in steps
    ):
        raise CorruptFileError(path, "list of processor steps", "steps must each have a registry_name and a config")
    return steps


def _normalizer_inside(config: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]) -> dict:
    """Return the normalizer of LeRobot 0.1 to 0.3, whose statistics are buffers among the weights.

    A buffer's name is the feature's with dots turned into underscores. It is found by flattening the names that
    the config lists, never by un-flattening: `observation.images.cam_high` has an underscore of its own.
    """
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    used = set()
    for kind in ("input_features", "output_features"):
        for feature in config[kind]:
            flat = feature.replace(".", "_")
            for module in OLD_NORMALIZERS:
                for which in ("mean", "std", "min", "max"):
                    name = f"{module}buffer_{flat}.{which}"
                    if name not in buffers:
                        continue
                    value = buffers[name].float().flatten()
                    known = statistics.setdefault(feature, {}).setdefault(which, value)
                    if not torch.equal(known, value):
                        raise CheckpointError(
                            f"The checkpoint normalises {feature} with one {which} and un-normalises it with another: "
                            f"{known.tolist()} against {value.tolist()}."
                        )
                    used.add(name)
    if unknown := set(buffers) - used:
        raise WeightsMismatchError("the published checkpoint's statistics", unexpected=unknown)
    return {"norm_map": config["normalization_mapping"], "statistics": statistics}


def _normalizer(folder: Path, steps: list[dict], kind: str) -> dict:
    found = [step for step in steps if step["registry_name"].startswith(kind)]
    if len(found) != 1:
        names = ", ".join(step["registry_name"] for step in steps)
        raise CheckpointError(f"{folder} should have one {kind} among its processor steps; it has: {names}.")
    state_file = found[0].get("state_file")
    if state_file is None:
        return found[0]["config"] | {"statistics": {}}
    # A file name only: a checkpoint must not reach outside its folder.
    path = folder / Path(state_file).name
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _read_weights(path).items():
        feature, _, which = key.rpartition(".")
        statistics.setdefault(feature, {})[which] = value.float().flatten()
    return found[0]["config"] | {"statistics": statistics}


def _build_processor(
    config: PolicyConfig, normalizer: dict, unnormalizer: dict, rename_map: dict[str, str], source: str
) -> PolicyProcessor:
    statistics = normalizer["statistics"]
    actions = unnormalizer["statistics"].get(ACTION, statistics.get(ACTION, {}))
    mode = config.normalization_mode(config.output_features[ACTION])
    for which in NormalizationMode(mode).statistics:
        before, after = statistics.get(ACTION, {}).get(which), actions.get(which)
        absent = before is None or after is None
        if absent or not torch.equal(before, after):
            told = ["nothing" if value is None else value.tolist() for value in (before, after)]
            raise (MissingStatisticsError if absent else CheckpointError)(
                f"{source} normalises and un-normalises actions with different {which}: {told[0]} against {told[1]}."
            )
    return PolicyProcessor.from_config(
        config,
        statistics | {ACTION: actions},
        normalization_eps=normalizer.get("eps", 1e-8),
        rename_map=rename_map,
    )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()) or "nothing"
