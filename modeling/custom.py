"""BasePolicyModel: policies written after InternManip's template become policies of this library as they stand.

The template names a plain config class, calls `super().__init__()` without it, and defines `forward(batch, train)`,
`inference(batch)` and `calc_loss(batch)`. Here such a class is saved, loaded, trained and run like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from transformers import BatchFeature

from ..configuration.features import ACTION, ENVIRONMENT_STATE, STATE
from ..configuration.policy import PolicyConfig
from ..errors import InvalidConfigError, PredictionError
from .output import PolicyOutput
from .policy import PolicyModel
from .registry import register_policy


class CustomPolicyConfig(PolicyConfig):
    """Save a custom policy's own config object beside what every policy has; its values can be read from here.

    Args:
        custom (`dict`): the fields of the policy's own config, as plain values.
    """

    model_type = "custom"
    own_class: ClassVar[type | None] = None

    custom: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        own = {name: kwargs.pop(name) for name in self.further_fields() if name in kwargs}
        self.custom = self._with_defaults((self.custom or {}) | own)
        super().__post_init__(**kwargs)

    @classmethod
    def further_fields(cls) -> dict[str, Any]:
        """Return the fields of the policy's own config with their types; they can be set here as if they were ours."""
        if hasattr(cls.own_class, "model_fields"):  # pydantic
            return {name: field.annotation for name, field in cls.own_class.model_fields.items()}
        return get_type_hints(cls.own_class) if dataclasses.is_dataclass(cls.own_class) else {}

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return what a caller may set, with its type; of the policy's own config too."""
        return cls.further_fields() | super().field_types()

    def _with_defaults(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with the own config's defaults; as they are where one without a default is absent."""
        if self.own_class is None:
            return values
        try:
            return _as_dict(self.own_class(**values))
        except (TypeError, ValueError):
            return values

    @classmethod
    def from_own(cls, own: Any) -> CustomPolicyConfig:
        """Return the config that saves `own`: a pydantic model, a dataclass or a mapping."""
        return cls(custom=_as_dict(own))

    @property
    def own(self) -> Any:
        """The policy's own config object."""
        return self.own_class(**self.custom) if self.own_class is not None else self.custom

    @property
    def action_horizon(self) -> int | None:
        """Actions predicted at once, when the policy's own config says so."""
        return self._own_value("action_horizon", "chunk_size", "horizon")

    @property
    def n_action_steps(self) -> int | None:
        """Actions executed before the next prediction; the whole chunk when the policy's own config is silent."""
        return self._own_value("n_action_steps")

    def _own_value(self, *names: str) -> Any:
        return next((self.custom[name] for name in names if name in self.custom), None)

    def __getattr__(self, name: str) -> Any:  # only asked when nothing else has the name
        custom = self.__dict__.get("custom") or {}
        if name in custom:
            return custom[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; its own fields: {', '.join(custom)}")


class BasePolicyModel(PolicyModel):
    """Run a policy that follows InternManip's template for custom policies.

    Subclasses define `calc_loss(batch)` → scalar and `inference(batch)` → `{"action_pred": (b, h, a)}`. `batch` holds
    normalised tensors under the dataset's names: `observation.state` (b, s), `observation.environment_state`,
    `observation.images.<camera>` (b, c, h, w), and for the loss `action` (b, h, a), `action_is_pad` (b, h).
    """

    config_class = CustomPolicyConfig

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _with_config(cls, cls.__dict__["__init__"])

    def __init__(self, config: PolicyConfig | None = None):
        super().__init__(config if config is not None else self._given_config)

    @staticmethod
    def register(model_type: str) -> Callable[[type[BasePolicyModel]], type[BasePolicyModel]]:
        """Register the decorated class under `model_type`; its config class is that of `__init__`'s `config`."""

        def decorate(policy_class: type[BasePolicyModel]) -> type[BasePolicyModel]:
            own = _own_config_class(policy_class)
            if own is not None and issubclass(own, PolicyConfig):
                policy_class.config_class = own
            else:
                name = f"{policy_class.__name__}Config"
                fields = {"model_type": model_type, "own_class": own, "__module__": policy_class.__module__}
                policy_class.config_class = type(name, (CustomPolicyConfig,), fields)
            return register_policy(model_type)(policy_class)

        return decorate

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and not isinstance(value, PolicyConfig):
            return  # the template's `self.config = config`: the config that is saved holds the same values
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take a batch as the template does, or model inputs as Trainer and pipeline give them."""
        if args or "batch" in kwargs:
            return super().__call__(*args, **kwargs)
        batch = self.dataset_batch(kwargs)
        if ACTION in batch:
            loss = self.calc_loss(batch)
            return PolicyOutput(loss=loss, losses={})
        predicted = self.inference(batch)
        if "action_pred" not in predicted:
            raise PredictionError(
                f"{type(self).__name__}.inference returned {', '.join(map(str, predicted)) or 'nothing'}, but no "
                f"'action_pred'. Return {{'action_pred': actions}}, of shape (batch, horizon, action width)."
            )
        return PolicyOutput(actions=predicted["action_pred"])

    def dataset_batch(self, inputs: Mapping[str, Any]) -> BatchFeature:
        """Return model inputs under the dataset's names."""
        names = {"state": STATE, "environment_state": ENVIRONMENT_STATE, "actions": ACTION}
        batch = {names.get(name, name): value for name, value in inputs.items() if name != "pixel_values"}
        if "pixel_values" in inputs:
            views = inputs["pixel_values"]
            views = views.unbind(-4) if isinstance(views, torch.Tensor) else views
            batch |= dict(zip(self.config.image_features, views, strict=True))
        return BatchFeature(data=batch)

    def calc_loss(self, batch: Mapping[str, Any], **kwargs: Any) -> torch.Tensor:
        """Return the training loss of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define calc_loss(batch)")

    def inference(self, batch: Mapping[str, Any], **kwargs: Any) -> Mapping[str, torch.Tensor]:
        """Return `action_pred` (b, h, a) for a batch of observations."""
        raise NotImplementedError(f"{type(self).__name__} must define inference(batch)")


def _with_config(cls: type[BasePolicyModel], init: Callable) -> Callable:
    """Wrap a subclass's constructor: it gets its own config, `super().__init__()` the one that is saved."""

    @functools.wraps(init)
    def wrapped(self, config, *args, **kwargs):
        outermost = type(self) is cls
        if outermost:
            saved = config if isinstance(config, PolicyConfig) else self.config_class.from_own(config)
            object.__setattr__(self, "_given_config", saved)
            config = saved.own if isinstance(saved, CustomPolicyConfig) else saved
        init(self, config, *args, **kwargs)
        if outermost:
            self.post_init()

    return wrapped


def _own_config_class(policy_class: type) -> type | None:
    try:
        hint = get_type_hints(policy_class.__init__).get("config")
    except NameError:  # an annotation that only a type checker can resolve
        hint = None
    return hint if inspect.isclass(hint) else None


def _as_dict(own: Any) -> dict[str, Any]:
    if hasattr(own, "model_dump"):  # pydantic
        return own.model_dump(mode="json")
    if dataclasses.is_dataclass(own):
        return dataclasses.asdict(own)
    if isinstance(own, Mapping):
        return dict(own)
    raise InvalidConfigError(
        f"A custom policy's config is a pydantic model, a dataclass or a mapping; got {type(own).__name__}."
    )
