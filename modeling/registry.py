"""The registry of policies: model type → policy class, and through it its config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..configuration.policy import PolicyConfig
from ..errors import InvalidConfigError, UnknownPolicyError, nearest
from ..families import TITLES
from ..plugins import load_entry_points

_POLICIES: dict[str, type[PreTrainedModel]] = {}
_PROCESSORS: dict[str, type | None] = {}  # those that policies were registered with
_KNOWN_TO_TRANSFORMERS: set[str] = set()
# What else is done about a policy class and the processor it was registered with; processors stand beside this room.
_LISTENERS: list[Callable[[type[PreTrainedModel], type | None], None]] = []


def register_policy(
    model_type: str, processor: type | None = None, title: str | None = None
) -> Callable[[type[PreTrainedModel]], type[PreTrainedModel]]:
    """Register the decorated policy class, which names its `config_class`, with this library and with transformers.

    Args:
        model_type: the name in config.json.
        processor: the processor class that feeds it; by default `PolicyProcessor`, or `LanguageProcessor` for a policy
            whose config says `reads_instruction`.
        title: what the policy is called in cards and messages.

    Raises:
        InvalidConfigError: the name is taken, or the class has no `PolicyConfig` of that model type.
    """

    def register(policy_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        config_class = getattr(policy_class, "config_class", None)
        if not (isinstance(config_class, type) and issubclass(config_class, PolicyConfig)):
            raise InvalidConfigError(
                f"{policy_class.__name__} needs a class attribute `config_class`, a subclass of PolicyConfig; "
                f"it has {config_class!r}."
            )
        if config_class.model_type != model_type:
            raise InvalidConfigError(
                f"{config_class.__name__}.model_type is {config_class.model_type!r}, registered as {model_type!r}: "
                f"they must agree, since config.json names the policy by it."
            )
        known = _POLICIES.get(model_type)
        if known is not None and known.__qualname__ != policy_class.__qualname__:
            raise InvalidConfigError(f"Model type {model_type!r} is taken by {known.__name__}; choose another.")
        _POLICIES[model_type], _PROCESSORS[model_type] = policy_class, processor
        if title is not None:
            TITLES[model_type] = title
        # AutoPolicy's own mapping decides; a name that transformers has claimed meanwhile is left to it.
        again = model_type in _KNOWN_TO_TRANSFORMERS  # a notebook cell that is run twice
        with suppress(ValueError):
            AutoConfig.register(model_type, config_class, exist_ok=again)
            AutoModel.register(config_class, policy_class, exist_ok=again)
            _KNOWN_TO_TRANSFORMERS.add(model_type)
        for listener in _LISTENERS:
            listener(policy_class, processor)
        return policy_class

    return register


def when_registered(listener: Callable[[type[PreTrainedModel], type | None], None]) -> None:
    """Call `listener(policy_class, processor)` for every policy, those that are registered already included."""
    _LISTENERS.append(listener)
    for model_type, policy in _POLICIES.items():
        listener(policy, _PROCESSORS[model_type])


def policy_class(model_type: str) -> type[PreTrainedModel]:
    """Return the policy class of `model_type`.

    Raises:
        UnknownPolicyError: none is registered.
    """
    load_entry_points()
    if model_type not in _POLICIES:
        raise UnknownPolicyError(f"No policy has the model type {model_type!r}. {nearest(model_type, _POLICIES)}")
    return _POLICIES[model_type]


def registered_policies() -> dict[str, type[PreTrainedModel]]:
    """Return all registered policies by model type."""
    return dict(_POLICIES)
