"""Contract: what a policy expects and returns, as a table for the person who connects the robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..configuration.features import ACTION, STATE, FeatureType

if TYPE_CHECKING:
    from .processor import PolicyProcessor


@dataclass(frozen=True)
class ContractEntry:
    """Describe one feature.

    Args:
        name: under which it goes in or comes out.
        direction: `"in"` or `"out"`.
        shape: (width,) or (channels, height, width).
        normalization: mode, such as `MEAN_STD`.
        optional: whether an observation may lack it.
        dimensions: per dimension of a vector its name, unit, lowest and highest value in training, and, of relative
            actions, the state dimension they are relative to; None where not recorded.
    """

    name: str
    direction: str
    shape: tuple[int, ...]
    normalization: str
    optional: bool = False
    dimensions: Sequence[tuple[str | None, str | None, float | None, float | None, str | None]] = ()


@dataclass(frozen=True)
class Contract:
    """Hold all entries; `print(processor.contract())` shows them."""

    entries: Sequence[ContractEntry]
    embodiment: str | None = None
    instruction_tokens: int | None = None  # at most, of policies that read an instruction

    def __str__(self) -> str:
        lines = [f"Embodiment: {self.embodiment}"] if self.embodiment else []
        for entry in self.entries:
            optional = ", optional" if entry.optional else ""
            arrow = "→" if entry.direction == "in" else "←"
            lines.append(f"{arrow} {entry.name}  {entry.shape}  {entry.normalization}{optional}")
            for index, (name, unit, low, high, relative) in enumerate(entry.dimensions):
                words = [f"    {index:>3}  {name or 'unnamed':<28} [{unit or 'unit not recorded'}]"]
                if low is not None and high is not None:
                    words.append(f"  {low:.4g} … {high:.4g}")
                if relative is not None:
                    words.append(f"  relative to {relative}")
                lines.append("".join(words))
        if self.instruction_tokens is not None:
            lines.append(f"→ task  the instruction in words, at most {self.instruction_tokens} tokens")
        return "\n".join(lines)


def contract_of(processor: PolicyProcessor) -> Contract:
    """Return the contract that a processor keeps."""
    names = (*processor.input_features, *processor.output_features)
    entries = [_entry(processor, name) for name in names]
    return Contract(entries, processor.embodiment, getattr(processor, "max_instruction_tokens", None))


def _entry(processor: PolicyProcessor, name: str) -> ContractEntry:
    feature = (processor.input_features | processor.output_features)[name]
    return ContractEntry(
        name,
        "out" if name in processor.output_features else "in",
        feature.shape,
        processor.describe_normalization(name),
        name in processor.optional_cameras,
        () if feature.type is FeatureType.VISUAL else _dimensions(processor, name, feature.shape[0]),
    )


def _dimensions(processor: PolicyProcessor, name: str, width: int) -> list[tuple]:
    recorded = processor.chosen_statistics().get(name, {})
    names = (processor.dimension_names or {}).get(name) or [None] * width
    units = (processor.units or {}).get(name) or [None] * width
    low, high = (recorded.get(which) or [None] * width for which in ("min", "max"))
    relative_to = (processor.relative_to if name == ACTION else None) or [None] * width
    state_names = (processor.dimension_names or {}).get(STATE)
    references = [i if i is None else f"{STATE} {state_names[i] if state_names else i}" for i in relative_to]
    return list(zip(names, units, low, high, references, strict=True))
