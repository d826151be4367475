"""ProcessorPart: what the parts that a processor holds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..configuration.features import PolicyFeature
from ..errors import InvalidConfigError

# Fields that a part is given and that are not its own: they are saved once, or in files of their own.
_GIVEN = ("inputs", "outputs", "robots", "tokenizer", "resizes_pictures", "network_resizes_to")


@dataclass(kw_only=True)
class ProcessorPart:
    """Do one part of a processor's work, such as its pictures.

    The fields that subclasses add are saved in processor_config.json, and are attributes of the processor too.

    Args:
        inputs, outputs: the policy's features.
    """

    inputs: dict[str, PolicyFeature]
    outputs: dict[str, PolicyFeature]

    # The fields that the policy's config has too, and in which the two must agree.
    config_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the saved fields."""
        return [field.name for field in fields(cls) if field.name not in _GIVEN]

    def change(self, name: str, value: Any) -> None:
        """Set a field, check it as the constructor does, and take it back where it does not fit."""
        before = dict(vars(self))
        setattr(self, name, value)
        try:
            if hasattr(self, "__post_init__"):
                self.__post_init__()
        except Exception:
            vars(self).clear()
            vars(self).update(before)
            raise

    @property
    def features(self) -> dict[str, PolicyFeature]:
        """Inputs and outputs."""
        return self.inputs | self.outputs


def as_mapping(name: str, value: Any) -> Mapping:
    """Return the value of a field that is a mapping, empty for None.

    Raises:
        InvalidConfigError: it is something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InvalidConfigError(f"A processor's {name} is a mapping; got {value!r}.")
    return value or {}
