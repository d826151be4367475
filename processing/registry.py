"""Which processor feeds which policy."""

from __future__ import annotations

from importlib import import_module

from ..configuration.policy import PolicyConfig
from ..families import FAMILIES
from .language import LanguageProcessor
from .processor import PolicyProcessor

# Those that `register_policy` was given.
_PROCESSORS: dict[str, type[PolicyProcessor]] = {}


def register_processor(model_type: str, processor_class: type[PolicyProcessor]) -> None:
    """Say which processor feeds policies of `model_type`, where the general one does not."""
    _PROCESSORS[model_type] = processor_class


def processor_class(config: PolicyConfig | type[PolicyConfig]) -> type[PolicyProcessor]:
    """Return the processor class that feeds the policy of a config; of a config class, the one it may need at most."""
    if (backbone := getattr(config, "backbone_config", None)) is not None and isinstance(backbone, PolicyConfig):
        return processor_class(backbone)  # of a composed policy, the backbone says what is read
    if (own := _PROCESSORS.get(config.model_type)) is not None:
        return own
    family = FAMILIES.get(config.model_type)
    if family is not None and family.processor is not None:
        module, name = family.processor.split(":")
        return getattr(import_module(f"..{module}", __package__), name)
    return LanguageProcessor if config.reads_instruction else PolicyProcessor
