"""Which processor feeds which policy."""

from __future__ import annotations

from ..configuration.policy import PolicyConfig
from .language import LanguageProcessor
from .processor import PolicyProcessor

_PROCESSORS: dict[str, type[PolicyProcessor]] = {}


def register_processor(model_type: str, processor_class: type[PolicyProcessor]) -> None:
    """Say which processor feeds policies of `model_type`, where none of the general two does."""
    _PROCESSORS[model_type] = processor_class


def processor_class(config: PolicyConfig | type[PolicyConfig]) -> type[PolicyProcessor]:
    """Return the processor class that feeds the policy of a config; of a config class, the one it may need at most."""
    general = LanguageProcessor if config.reads_instruction else PolicyProcessor
    return _PROCESSORS.get(config.model_type, general)
