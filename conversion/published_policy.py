"""PublishedPolicy: what is peculiar to one policy in the checkpoints that other projects publish."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoint import Checkpoint
from ..configuration.features import STATE, FeatureType, PolicyFeature
from ..configuration.policy import PolicyConfig
from ..errors import CheckpointError, InvalidConfigError, nearest
from ..modeling.loading import load_weights
from ..modeling.policy import PolicyModel

logger = logging.get_logger(__name__)

Weights = Mapping[str, torch.Tensor]

# What LeRobot's config.json says of training, of publishing and of the machine: none of it changes an action.
_HARMLESS = frozenset(
    (
        "action_feature_names",
        "attention_implementation",
        "compile_mode",
        "compile_model",
        "device",
        "dtype",
        "gradient_checkpointing",
        "license",
        "pretrained_path",
        "pretrained_revision",
        "private",
        "push_to_hub",
        "relative_exclude_joints",
        "repo_id",
        "tags",
        "type",
        "use_amp",
        "use_cache",
        "use_peft",
        "use_relative_actions",  # the steps beside it say so too
    )
)
_LORA = re.compile(r"(?:^|[._])lora_(?:a|b|embedding|magnitude)", re.IGNORECASE)
_HARMLESS_BEGINNINGS = ("optimizer_", "scheduler_")


def _all(weights: Weights, module: nn.Module) -> Weights:
    return weights


@dataclass(frozen=True)
class PublishedPolicy:
    """Say how a policy's published weights and config become ours.

    Args:
        policy_class: ours.
        components: prefix of a component's weights in the policy → its class, such as
            `{"action_head.": ACTActionHead}`.
        rename: published state dict → the same under our names; names that it does not know stay.
        fields: published config and renamed weights → fields of our config. The weights say what a published config
            only names.
        trim: renamed weights and the module that is to receive them → without those that it has no place for by its
            config.
        lerobot_type: what LeRobot's config.json calls it; None where LeRobot does not publish it.
        text_steps: the steps by which LeRobot's preprocessor makes its prompts, where it reads an instruction.
    """

    policy_class: type[PolicyModel]
    components: Mapping[str, type[nn.Module]]
    rename: Callable[[Weights], dict[str, torch.Tensor]]
    fields: Callable[[Mapping[str, Any], Weights], dict[str, Any]]
    trim: Callable[[Weights, nn.Module], Weights] = _all
    lerobot_type: str | None = None
    text_steps: tuple[str, ...] = ()

    def prefix_of(self, module: nn.Module) -> str | None:
        """Return the prefix of a module's weights in the policy, "" for the policy itself; None for a stranger."""
        if isinstance(module, self.policy_class):
            return ""
        return next((prefix for prefix, kind in self.components.items() if isinstance(module, kind)), None)


_PUBLISHED: dict[type[PolicyModel], PublishedPolicy] = {}


def register_published(kind: PublishedPolicy) -> PublishedPolicy:
    """Make a policy's published names known to `load_published` and to the layouts that several policies share."""
    _PUBLISHED[kind.policy_class] = kind
    return kind


def published_policies() -> list[PublishedPolicy]:
    """Return what is known of policies that other projects publish."""
    return list(_PUBLISHED.values())


def is_off(value: Any) -> bool:
    """Tell whether the value of a field says that what it stands for is not there."""
    return value is None or value is False or value in ([], {})


def require_known(file: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that every field is known, unless it is switched off.

    Args:
        file: for messages.
        given: its fields.
        known: names of those that are read, or change nothing.

    Raises:
        InvalidConfigError: one is not, and may change what the network computes.
    """
    for name, value in given.items():
        if name not in known and not is_off(value):
            raise InvalidConfigError(
                f"{file} has {name}={value!r}, which this library does not know: it may change what the network "
                f"computes. {nearest(str(name), known)} If it changes nothing, remove the line or set it to null."
            )


def known_fields(
    config: Mapping[str, Any], config_class: type[PolicyConfig], read: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the fields of a LeRobot config.json that our config has too; what changes no action is left out.

    Args:
        config: LeRobot's.
        config_class: ours.
        read: names of further fields, which the caller reads.

    Raises:
        InvalidConfigError: a field that is not known here is switched on, and may change what the network computes.
    """
    settable = [name for name, value in vars(config_class).items() if isinstance(value, property) and value.fset]
    own = {*config_class.field_names(), *settable}
    harmless = {name for name in config if name in _HARMLESS or name.startswith(_HARMLESS_BEGINNINGS)}
    require_known("config.json", config, {*own, *read, *harmless})
    fields = {name: value for name, value in config.items() if name in own}
    for name, value in fields.items():
        is_truth = name in settable or config_class.__dataclass_fields__[name].type is bool
        if is_truth and value in (0, 1):
            fields[name] = bool(value)  # LeRobot saves a config that it has read again with 0 for false
    inputs = {name: PolicyFeature.from_value(value) for name, value in config["input_features"].items()}
    unread = [name for name, feature in inputs.items() if feature.type is FeatureType.STATE and name != STATE]
    if unread:
        logger.warning(
            f"config.json lists {', '.join(unread)} beside {STATE}. LeRobot lists every vector of a dataset and reads "
            f"{STATE} alone: the policy has never seen the others. Leave them out of observations."
        )
    fields["input_features"] = {name: feature for name, feature in inputs.items() if name not in unread}
    left_out = sorted(set(config) - set(fields))
    logger.info(f"Fields of the published config.json that this library does not use: {', '.join(left_out)}")
    return fields


def refuse_lora(source: object, names: Iterable[str]) -> None:
    """Refuse weights among which LoRA's stand beside those that they change.

    Raises:
        CheckpointError: without them the policy would be another one.
    """
    found = sorted(name for name in names if _LORA.search(name))
    if found:
        raise CheckpointError(
            f"{source} holds {len(found)} LoRA weights beside the others, {found[0]} among them: without them the "
            f"policy would be another one. Merge them into the weights they belong to and save again. Of peft: "
            f"model.merge_and_unload(). Of openpi: add lora_a · lora_b · alpha / rank to every weight before it is "
            f"converted."
        )


def build_policy(
    policy_class: type[PolicyModel],
    config: PolicyConfig,
    weights: Weights,
    checkpoint: Checkpoint,
    loading: Mapping[str, Any],
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Return the policy of a config and its renamed weights, in eval mode; strictly, unless `loading` says otherwise.

    Args:
        policy_class: ours.
        config: ours.
        weights: under our names.
        checkpoint: where they come from.
        loading: what `modeling.loading.load_weights` takes, as the caller gave it.
        dtype: of the weights when `loading` names none; by default float32.
    """
    refuse_lora(checkpoint.source, weights)
    chosen = loading.get("dtype") or loading.get("torch_dtype")
    chosen = dtype if chosen in (None, "auto") else chosen
    rest = {name: value for name, value in loading.items() if name not in ("dtype", "torch_dtype")}
    return load_weights(
        policy_class,
        None,
        config,
        source=checkpoint.source,
        state_dict=dict(weights),
        dtype=chosen or torch.float32,
        **rest,
    )


def policy_of(built: Any) -> PolicyModel:
    """Return the policy of what `build_policy` returns, which is a pair with `output_loading_info=True`."""
    return built[0] if isinstance(built, tuple) else built


def require_tokenizer_use(config: PolicyConfig, tokenizer: Any) -> None:
    """Check that a tokenizer is only given to a policy that reads an instruction.

    Raises:
        InvalidConfigError: the policy reads none.
    """
    if tokenizer is not None and not config.reads_instruction:
        raise InvalidConfigError(f"tokenizer= has no use: {type(config).__name__} reads no instruction here.")
