"""LeRobot's checkpoints: flat config.json, `model.` weights, statistics beside them (0.4 and later) or among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._files import read_json
from ..configuration.features import ACTION, FeatureType, NormalizationMode
from ..configuration.policy import PolicyConfig
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
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from ..processing.registry import processor_class
from .act import ACT
from .diffusion import DIFFUSION
from .pi0 import PI0
from .published_policy import PublishedPolicy, build_policy, listing, read_weights

# Where LeRobot 0.1 to 0.3 keep statistics: modules of the policy itself.
OLD_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
POLICIES: dict[str, PublishedPolicy] = {"act": ACT, "diffusion": DIFFUSION, "pi0": PI0}


def is_config(config: Mapping[str, Any]) -> bool:
    """Tell LeRobot's config.json by its `type`, which ours calls `model_type`."""
    return "type" in config and "model_type" not in config


def read_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    source: str,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    **overrides: Any,
) -> tuple[PolicyModel, PolicyProcessor | None]:
    """Load policy and processor from a folder as LeRobot publishes it.

    Args:
        folder: with config.json, model.safetensors and the two processors.
        config: the parsed config.json.
        source: for messages.
        dtype: of the weights; by default the config's `dtype` where it names one, else float32, in which LeRobot runs
            them whatever the file holds.
        tokenizer: of a policy that reads instructions, see `LanguageProcessor.from_config`; the config only names it.
        with_processor: leave the processor out when False.
        overrides: fields of our config.

    Raises:
        UnknownPolicyError, MissingFileError, CorruptFileError, WeightsMismatchError, MissingStatisticsError.
    """
    if config["type"] not in POLICIES:
        raise UnknownPolicyError(
            f"{source} is a LeRobot policy of type {config['type']!r}. {nearest(config['type'], POLICIES)}"
        )
    for features in ("input_features", "output_features"):
        if not isinstance(config.get(features), Mapping):
            raise InvalidConfigError(f"The config.json of {source} has no {features}; published ones list them all.")
    kind = POLICIES[config["type"]]
    published = read_weights(folder / "model.safetensors")
    statistics_inside = {name for name in published if name.startswith(OLD_NORMALIZERS)}
    if statistics_inside:
        normalizer = unnormalizer = _normalizer_inside(config, {n: published.pop(n) for n in statistics_inside})
        general = {}
    else:
        normalizer, unnormalizer, general = _read_processors(folder)
    weights = kind.rename(published)
    fields = kind.fields(config, weights)
    fields["normalization_mapping"] = {
        feature: normalizer["norm_map"].get(feature, "IDENTITY") for feature in FeatureType.__members__
    }
    policy_config = kind.policy_class.config_class.from_dict(fields, **overrides)
    policy = build_policy(kind.policy_class, policy_config, weights, source, dtype or config.get("dtype"))
    if not with_processor:
        return policy, None
    if policy_config.reads_instruction:
        general["tokenizer"] = tokenizer
    return policy, _build_processor(policy_config, normalizer, unnormalizer, general, source)


# --- processors -------------------------------------------------------------------------------------------


def _read_processors(folder: Path) -> tuple[dict, dict, dict[str, Any]]:
    """Return normalizer and unnormalizer (their config and `statistics`), and the other fields of our processor."""
    if not (folder / PREPROCESSOR).is_file() or not (folder / POSTPROCESSOR).is_file():
        raise MissingFileError(
            f"{folder} holds no {PREPROCESSOR} and {POSTPROCESSOR}, where LeRobot 0.4 and later keep the "
            f"statistics, nor are there any among the weights, as in 0.1 to 0.3; it holds {listing(folder)}. "
            f"Without statistics a policy's actions mean nothing."
        )
    before, after = _read_steps(folder / PREPROCESSOR), _read_steps(folder / POSTPROCESSOR)
    renames = [step["config"].get("rename_map", {}) for step in before if "rename" in step["registry_name"]]
    general: dict[str, Any] = {"rename_map": {old: new for renamed in renames for old, new in renamed.items()}}
    relative = [step["config"] for step in before if step["registry_name"] == "relative_actions_processor"]
    if relative and relative[0].get("enabled"):
        general["relative_to"] = relative[0]
    return _normalizer(folder, before, "normalizer"), _normalizer(folder, after, "unnormalizer"), general


def _relative_to(step: Mapping[str, Any], width: int) -> list[int | None]:
    """Return the state dimension that each action dimension is relative to: its own, unless its name is excluded."""
    excluded = [str(name).lower() for name in step.get("exclude_joints") or () if name]
    names = [str(name).lower() for name in step.get("action_names") or ()]
    names += [""] * (width - len(names))
    return [None if any(word in names[i] for word in excluded) else i for i in range(width)]


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
    for key, value in read_weights(path).items():
        feature, _, which = key.rpartition(".")
        statistics.setdefault(feature, {})[which] = value.float().flatten()
    return found[0]["config"] | {"statistics": statistics}


def _build_processor(
    config: PolicyConfig, normalizer: dict, unnormalizer: dict, general: dict[str, Any], source: str
) -> PolicyProcessor:
    if "relative_to" in general:
        general = general | {"relative_to": _relative_to(general["relative_to"], config.robot_action_dim)}
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
    return processor_class(config).from_config(
        config,
        statistics | {ACTION: actions},
        normalization_eps=normalizer.get("eps", 1e-8),
        **general,
    )
