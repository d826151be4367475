"""StrictConfig: a configuration that converts what JSON can say, checks it, and knows its own names."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import PreTrainedConfig

from ..errors import InvalidConfigError, ManipulatorsError, UnknownConfigFieldError
from .typed_values import to_field_type

# What transformers, accelerate and peft set on a config of their own accord; everything else must be a field.
RUNTIME_NAMES = frozenset(
    (
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "distributed_config",
        "eos_token_id",
        "experts_implementation",
        "fusion_config",
        "kernel_config",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "pad_token_id",
        "per_layer_config",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
        "use_cache",
    )
)

# Arguments of loading weights that `transformers.pipeline` gives to the config as well, before it loads the policy.
PASSED_BY_PIPELINES = frozenset(
    (
        *("allow_partial", "base", "device_map", "low_cpu_mem_usage", "max_memory", "offload_buffers"),
        *("offload_folder", "quantization_config", "use_safetensors"),
    )
)


# Fields that an override replaces whole: another robot's features are not completed from this one's.
REPLACED_WHOLE = ("input_features", "output_features", "state_parts", "action_parts")


def completed(saved: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved fields with overrides; a mapping is completed at every depth from what is saved.

    One of another `type` or `model_type` than the saved one is taken whole, as are the features of a robot.
    """
    merged = dict(saved)
    for name, value in overrides.items():
        name = name.value if isinstance(name, Enum) else name
        before = merged.get(name)
        fits = isinstance(before, Mapping) and isinstance(value, Mapping) and name not in REPLACED_WHOLE
        if fits and all(before.get(kind) == value.get(kind, before.get(kind)) for kind in ("type", "model_type")):
            value = completed(before, value)
        merged[name] = value
    return merged


def part_config(title: str, build: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """Return the config of a part that transformers describes, such as a vision tower.

    Args:
        title: the field that holds it, for messages.
        build: its class, or another constructor of it; called with the rest.

    Raises:
        InvalidConfigError: a field has a value that no such part can be built from.
    """
    try:
        return build(*args, **fields)
    except ManipulatorsError:
        raise
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InvalidConfigError(f"{title}: {error.__cause__ or error}") from error


class StrictConfig(PreTrainedConfig):
    """Hold typed fields: of a policy, or of a component that has a config of its own.

    Values are converted first (JSON lists to tuples, int to float), then type-checked; names that do not exist raise,
    in the constructor, on assignment and from JSON. Methods named `validate_…` check what must agree.
    """

    def __init_subclass__(cls, **kwargs):
        # With `from __future__ import annotations` types are text, by which nothing could be converted or checked.
        cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
        super().__init_subclass__(**kwargs)
        strict(cls)  # checks types in __setattr__; ours must come first, so it is wrapped around it
        _convert_before_checking(cls)

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if not self.knows(name):
                raise UnknownConfigFieldError(type(self).__name__, name, self.field_names())
        try:
            super().__post_init__(**kwargs)
        except AttributeError as error:
            if "module 'torch' has no attribute" not in str(error):
                raise
            raise InvalidConfigError(
                f"dtype={self.dtype!r} is not a type of weights. Choose 'float32', 'bfloat16' or 'float16'."
            ) from error

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        """Return the value with what it leaves open filled in."""
        return value

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the fields this library defines (not those of transformers)."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return what a caller may set, with its type."""
        return {name: cls.__dataclass_fields__[name].type for name in cls.field_names()}

    @classmethod
    def knows(cls, name: str) -> bool:
        """Tell whether a name is a field, or one that transformers, accelerate or peft set."""
        return name.startswith("_") or name in cls.__dataclass_fields__ or name in RUNTIME_NAMES

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build the config from saved JSON; `kwargs` override fields before any is checked, and must name fields.

        A mapping that is overridden in part keeps the rest of what is saved.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.field_names()}
        values = completed(config_dict, overrides)
        config, unused = super().from_dict(values, return_unused_kwargs=True, **kwargs)
        config.validate()  # an override may contradict another field
        if return_unused:  # asked by whoever has a use for them: arguments of loading weights, say
            return config, unused
        unknown = [name for name in unused if not name.startswith("_") and name not in PASSED_BY_PIPELINES]
        if unknown:
            raise UnknownConfigFieldError(cls.__name__, unknown[0], cls.field_names())
        return config


def _convert_before_checking(cls: type[StrictConfig]) -> None:
    """Wrap the strict checks of `cls`: convert values first, refuse unknown names, raise this library's errors."""
    checked_setattr, checked_validate = cls.__setattr__, cls.validate

    def converting_setattr(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property) and name not in RUNTIME_NAMES:
            if getattr(type(self), name).fset is None:
                raise InvalidConfigError(
                    f"{type(self).__name__}.{name} follows from the other fields and cannot be set."
                )
        elif not (self.knows(name) or hasattr(type(self), name)):
            raise UnknownConfigFieldError(type(self).__name__, name, self.field_names())
        field = type(self).__dataclass_fields__.get(name)
        try:
            value = to_field_type(self._completed(name, value), field.type) if field else value
            checked_setattr(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise InvalidConfigError(f"{type(self).__name__}.{name}: {error.__cause__ or error}") from error

    @functools.wraps(checked_validate)  # keeps the mark by which `strict` knows its own method
    def validate(self) -> None:
        try:
            checked_validate(self)
        except StrictDataclassClassValidationError as error:
            if isinstance(error.__cause__, ManipulatorsError):
                raise error.__cause__ from None
            raise InvalidConfigError(str(error.__cause__ or error)) from error

    cls.__setattr__, cls.validate = converting_setattr, validate
