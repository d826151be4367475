"""The one registry of policies: model type → policy class, and through it its config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel

from ..configuration.policy import PolicyConfig
from ..errors import InvalidConfigError, UnknownPolicyError, nearest
from ..plugins import load_entry_points

if TYPE_CHECKING:
    from .policy import PolicyModel

_POLICIES: dict[str, type[PolicyModel]] = {}
_KNOWN_TO_TRANSFORMERS: set[str] = set()


def register_policy(model_type: str) -> Callable[[type[PolicyModel]], type[PolicyModel]]:
    """Register the decorated policy class, which names its `config_class`, under `model_type`.

    Raises:
        InvalidConfigError: the name is taken, or the class has no `PolicyConfig` of that model type.
    """

    def register(policy_class: type[PolicyModel]) -> type[PolicyModel]:
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
        _POLICIES[model_type] = policy_class
        # AutoPolicy's own mapping decides; a name that transformers has claimed meanwhile is left to it.
        again = model_type in _KNOWN_TO_TRANSFORMERS  # a notebook cell that is run twice
        with suppress(ValueError):
            AutoConfig.register(model_type, config_class, exist_ok=again)
            AutoModel.register(config_class, policy_class, exist_ok=again)
            _KNOWN_TO_TRANSFORMERS.add(model_type)
        return policy_class

    return register


def policy_class(model_type: str) -> type[PolicyModel]:
    """Return the policy class of `model_type`.

    Raises:
        UnknownPolicyError: none is registered.
    """
    load_entry_points()
    if model_type not in _POLICIES:
        raise UnknownPolicyError(f"No policy has the model type {model_type!r}. {nearest(model_type, _POLICIES)}")
    return _POLICIES[model_type]


def registered_policies() -> dict[str, type[PolicyModel]]:
    """Return all registered policies by model type."""
    return dict(_POLICIES)
