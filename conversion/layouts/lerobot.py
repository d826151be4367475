"""LeRobot's checkpoints: flat config.json, `model.` weights, statistics beside them (0.4 and later) or among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.features import ACTION, FeatureType, NormalizationMode, PolicyFeature
from ...configuration.policy import PolicyConfig
from ...configuration.strict import completed
from ...errors import (
    CheckpointError,
    InvalidConfigError,
    MissingStatisticsError,
    UnknownPolicyError,
    WeightsMismatchError,
    nearest,
)
from ...modeling.loading import read_weights
from ...modeling.policy import PolicyModel
from ...processing.processor import PolicyProcessor
from ...processing.registry import processor_class
from ..lerobot_steps import PREPROCESSOR, RELATIVE, STATE_TEXT, Processors, state_files
from ..published_policy import PublishedPolicy, build_policy, published_policies, require_tokenizer_use
from ..rename import COMPILED

logger = logging.get_logger(__name__)

# Where LeRobot 0.1 to 0.3 keep statistics: modules of the policy itself.
OLD_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


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
        checkpoint: with config.json, weights and the two processors; without these, `processor_fields` must have
            `statistics`.
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
    processors, with_given = None, bool((processor_fields or {}).get("statistics"))
    published = read_weights(folder, checkpoint.variant)
    published = {name.replace(COMPILED, ""): value for name, value in published.items()}
    statistics_inside = {name for name in published if name.startswith(OLD_NORMALIZERS)}
    if statistics_inside:
        normalizer = unnormalizer = _normalizer_inside(config, {n: published.pop(n) for n in statistics_inside})
    elif not (folder / PREPROCESSOR).is_file() and (
        _needs_no_statistics(config) or (_names_modes(config) and (with_given or not with_processor))
    ):
        normalizer = unnormalizer = {"norm_map": config["normalization_mapping"], "statistics": {}}
    else:
        processors = Processors(folder)
        normalizer, unnormalizer = processors.normalizer, processors.unnormalizer
    weights = kind.rename(published)
    fields = kind.fields(config, weights)
    fields["normalization_mapping"] = {
        feature: normalizer["norm_map"].get(feature, "IDENTITY") for feature in FeatureType.__members__
    }
    config_class = kind.policy_class.config_class
    length = None if processors is None else processors.max_instruction_tokens
    if length is not None and "max_instruction_tokens" in config_class.field_names():
        fields["max_instruction_tokens"] = length  # by which LeRobot goes, whatever its config.json says
    policy_config = config_class.from_dict(fields, **overrides)
    require_tokenizer_use(policy_config, tokenizer)
    policy = build_policy(kind.policy_class, policy_config, weights, checkpoint, loading, config.get("dtype"))
    if not with_processor:
        return policy, None
    general: dict[str, Any] = {}
    if processors is not None:
        steps = kind.text_steps if policy_config.reads_instruction else ()
        processors.check_agreement(fields["input_features"], fields["output_features"], steps)
        if STATE_TEXT in steps and RELATIVE not in processors.names and "prompt_state_dim" not in overrides:
            logger.warning(
                f"{source} was written by a LeRobot from before {RELATIVE}. Some of those padded the state with zeros "
                f"before they wrote it into the prompt, which no file says: if the policy was trained so, "
                f"prompt_state_dim=32. If it was not: prompt_state_dim=None."
            )
        general["rename_map"] = processors.rename_map
        general["relative_to"] = processors.relative_to(policy_config.robot_action_dim)
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


def _policy_class(checkpoint: Checkpoint) -> type[PolicyModel]:
    return _published(checkpoint.config).policy_class


def _names_modes(config: Mapping[str, Any]) -> bool:
    """Return whether config.json itself says how each type of feature is normalised."""
    modes = config.get("normalization_mapping")
    return isinstance(modes, Mapping) and {"STATE", "ACTION"} <= modes.keys()


def _needs_no_statistics(config: Mapping[str, Any]) -> bool:
    """Return whether LeRobot 0.1 to 0.3 normalised none of the features."""
    modes = config.get("normalization_mapping")
    described = [feature for kind in ("input_features", "output_features") for feature in config[kind].values()]
    types = {PolicyFeature.from_value(feature).type.value for feature in described}
    return isinstance(modes, Mapping) and all(modes.get(kind) == "IDENTITY" for kind in types)


# --- processors -------------------------------------------------------------------------------------------


def _normalizer_inside(config: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]) -> dict:
    """Return the normalizer of LeRobot 0.1 to 0.3, whose statistics are buffers among the weights.

    A buffer's name is the feature's with dots turned into underscores. It is found by flattening the names that
    the config lists, never by un-flattening: `observation.images.cam_high` has an underscore of its own.
    """
    if not isinstance(config.get("normalization_mapping"), Mapping):
        raise InvalidConfigError(
            "config.json has no normalization_mapping, by which LeRobot 0.1 to 0.3 use the statistics among the "
            "weights."
        )
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


def _build_processor(
    config: PolicyConfig,
    normalizer: dict,
    unnormalizer: dict,
    general: dict[str, Any],
    overrides: dict[str, Any],
    source: str,
) -> PolicyProcessor:
    fields = completed({"normalization_eps": normalizer.get("eps", 1e-8), **general}, overrides)
    statistics = fields.pop("statistics", None) or _statistics(config, normalizer, unnormalizer, source)
    return processor_class(config).from_config(config, statistics, **fields)


def _statistics(config: PolicyConfig, normalizer: dict, unnormalizer: dict, source: str) -> dict[str, dict]:
    """Return the statistics of a checkpoint, whose two processors must agree on those of actions."""
    statistics, actions = normalizer["statistics"], unnormalizer["statistics"].get(ACTION, {})
    needed = NormalizationMode(config.normalization_mode(config.output_features[ACTION])).statistics
    if needed and not statistics and not actions:
        raise MissingStatisticsError(
            f"{source} holds no statistics, as one that was not tuned for a robot: its actions have no scale. Pass "
            f"those of your robot's data: statistics=LeRobotDataset('org/name').statistics, or "
            f"manipulators convert --statistics org/name. Training on a dataset takes the dataset's."
        )
    for which in needed:
        before, after = statistics.get(ACTION, {}).get(which), actions.get(which)
        absent = before is None or after is None
        if absent or not torch.equal(before, after):
            shown = ["nothing" if value is None else value.tolist() for value in (before, after)]
            raise (MissingStatisticsError if absent else CheckpointError)(
                f"{source} normalises and un-normalises actions with different {which}: {shown[0]} against {shown[1]}."
            )
    return statistics | {ACTION: actions}


register_layout(
    Layout(
        name="LeRobot",
        matches=is_config,
        policy_class=_policy_class,
        read=read_checkpoint,
        files=state_files,
    )
)
