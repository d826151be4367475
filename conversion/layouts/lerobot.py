"""LeRobot's checkpoints: flat config.json, `model.` weights, statistics beside them (0.4 and later) or among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..._files import read_json
from ...checkpoint import Checkpoint, Layout, listing, register_layout
from ...configuration.features import ACTION, FeatureType, NormalizationMode
from ...configuration.policy import PolicyConfig
from ...configuration.strict import completed
from ...errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    MissingStatisticsError,
    UnknownPolicyError,
    WeightsMismatchError,
    nearest,
)
from ...modeling.loading import read_tensors, read_weights
from ...modeling.policy import PolicyModel
from ...processing.processor import PolicyProcessor
from ...processing.registry import processor_class
from ..published_policy import PublishedPolicy, build_policy, published_policies, require_tokenizer_use
from ..rename import COMPILED

# Where LeRobot 0.1 to 0.3 keep statistics: modules of the policy itself.
OLD_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
# Steps that are done here too, or that change no number.
STEPS = (
    "absolute_actions_processor",
    "device_processor",
    "normalizer_processor",
    "pi0_new_line_processor",
    "relative_actions_processor",
    "rename_observations_processor",
    "to_batch_processor",
    "tokenizer_processor",
    "unnormalizer_processor",
)
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"


def is_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is LeRobot's, by its `type`; ours says `model_type`."""
    return "type" in config and "model_type" not in config


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    loading: Mapping[str, Any],
    processor_fields: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    **overrides: Any,
) -> tuple[Any, PolicyProcessor | None]:
    """Load policy and processor from a folder as LeRobot publishes it.

    Args:
        checkpoint: with config.json, weights and the two processors.
        loading: how the policy is loaded; its dtype is by default the config's where it names one, else float32, in
            which LeRobot runs it whatever the file holds.
        processor_fields: fields of our processor to override.
        tokenizer: of a policy that reads instructions, see `LanguageProcessor.from_config`; the config only names it.
        with_processor: leave the processor out when False.
        overrides: fields of our config.

    Raises:
        UnknownPolicyError, MissingFileError, CorruptFileError, WeightsMismatchError, MissingStatisticsError.
    """
    config, folder, source = checkpoint.config, checkpoint.folder, checkpoint.source
    kind = _published(config)
    for features in ("input_features", "output_features"):
        if not isinstance(config.get(features), Mapping):
            raise InvalidConfigError(f"The config.json of {source} has no {features}; published ones list them all.")
    published = read_weights(folder, checkpoint.variant)
    published = {name.replace(COMPILED, ""): value for name, value in published.items()}
    statistics_inside = {name for name in published if name.startswith(OLD_NORMALIZERS)}
    if statistics_inside:
        normalizer = unnormalizer = _normalizer_inside(config, {n: published.pop(n) for n in statistics_inside})
        general: dict[str, Any] = {}
    elif not (folder / PREPROCESSOR).is_file() and _needs_no_statistics(config):
        normalizer = unnormalizer = {"norm_map": config["normalization_mapping"], "statistics": {}}
        general = {}
    else:
        normalizer, unnormalizer, general = _read_processors(folder)
    weights = kind.rename(published)
    fields = kind.fields(config, weights)
    fields["normalization_mapping"] = {
        feature: normalizer["norm_map"].get(feature, "IDENTITY") for feature in FeatureType.__members__
    }
    policy_config = kind.policy_class.config_class.from_dict(fields, **overrides)
    require_tokenizer_use(policy_config, tokenizer)
    policy = build_policy(kind.policy_class, policy_config, weights, checkpoint, loading, config.get("dtype"))
    if not with_processor:
        return policy, None
    if policy_config.reads_instruction:
        general["tokenizer"] = tokenizer
    return policy, _build_processor(
        policy_config, normalizer, unnormalizer, general, dict(processor_fields or {}), source
    )


def _published(config: Mapping[str, Any]) -> PublishedPolicy:
    kinds = {kind.lerobot_type: kind for kind in published_policies() if kind.lerobot_type}
    if config["type"] not in kinds:
        raise UnknownPolicyError(
            f"The checkpoint is a LeRobot policy of type {config['type']!r}. {nearest(str(config['type']), kinds)}"
        )
    return kinds[config["type"]]


def _policy_class(config: Mapping[str, Any]) -> type[PolicyModel]:
    return _published(config).policy_class


def _needs_no_statistics(config: Mapping[str, Any]) -> bool:
    """Return whether LeRobot 0.1 to 0.3 normalised none of the features."""
    modes = config.get("normalization_mapping")
    types = {feature["type"] for kind in ("input_features", "output_features") for feature in config[kind].values()}
    return isinstance(modes, Mapping) and all(modes.get(kind) == "IDENTITY" for kind in types)


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
    found = _normalizer(folder, before, "normalizer"), _normalizer(folder, after, "unnormalizer"), general
    unknown = [step["registry_name"] for step in (*before, *after) if step["registry_name"] not in STEPS]
    if unknown:
        raise CheckpointError(
            f"{folder} runs processor steps that do not exist here: {', '.join(unknown)}. Without them the "
            f"policy would act on other numbers than it was trained on. Known: {', '.join(STEPS)}."
        )
    for normalizer in found[:2]:
        if normalizer.get("normalize_observation_keys") is not None:
            raise CheckpointError(
                f"{folder} normalises only some observations, normalize_observation_keys="
                f"{normalizer['normalize_observation_keys']}, which is not done here."
            )
    return found


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


def _state_files(folder: Path) -> list[str]:
    """Return the names of the files in which processor steps keep their tensors."""
    paths = [folder / name for name in (PREPROCESSOR, POSTPROCESSOR) if (folder / name).is_file()]
    steps = [step for path in paths for step in _read_steps(path)]
    return sorted({Path(step["state_file"]).name for step in steps if step.get("state_file")})


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
    for key, value in read_tensors(path).items():
        feature, _, which = key.rpartition(".")
        statistics.setdefault(feature, {})[which] = value.float().flatten()
    return found[0]["config"] | {"statistics": statistics}


def _build_processor(
    config: PolicyConfig,
    normalizer: dict,
    unnormalizer: dict,
    general: dict[str, Any],
    overrides: dict[str, Any],
    source: str,
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
            shown = ["nothing" if value is None else value.tolist() for value in (before, after)]
            raise (MissingStatisticsError if absent else CheckpointError)(
                f"{source} normalises and un-normalises actions with different {which}: {shown[0]} against {shown[1]}."
            )
    fields = completed({"normalization_eps": normalizer.get("eps", 1e-8), **general}, overrides)
    statistics = fields.pop("statistics", None) or statistics | {ACTION: actions}
    return processor_class(config).from_config(config, statistics, **fields)


register_layout(
    Layout(
        name="LeRobot",
        matches=is_config,
        policy_class=_policy_class,
        read=read_checkpoint,
        files=_state_files,
    )
)
