"""Tuning: choose which parts of a policy are trained, in full or with LoRA, and merge an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers.utils import PROCESSOR_NAME, logging

from ..auto import load_processor
from ..errors import InvalidConfigError, InvalidTuningError
from ..hub_cards.checkpoint_card import write_checkpoint_card
from ..modeling.adapters import add_adapter, base_of_adapter, has_adapter, is_adapter_parameter, merged
from ..modeling.policy import PolicyModel
from ..modeling.quantization import quantized_names
from ..processing.processor import PolicyProcessor

logger = logging.get_logger(__name__)

Mode = bool | Literal["lora"] | None


def apply_tuning(policy: PolicyModel, modes: Mapping[str, Mode], **lora: Any) -> None:
    """Freeze parts of a policy, train them in full, or put LoRA layers into them.

    With LoRA in one part, the adapter also holds a full copy of every other trained module.

    Args:
        policy: changed in place.
        modes: by part: False freezes, True trains, "lora" trains low-rank layers; None leaves it as it is.
        lora: what peft's `LoraConfig` takes, such as `r`, `lora_alpha`, `lora_dropout`, `use_dora`.

    Raises:
        InvalidTuningError: the policy has no such part, or no layers for LoRA in it.
        InvalidConfigError: LoRA in a policy that was not loaded from a checkpoint or has an adapter already.
    """
    chosen = {part: mode for part, mode in modes.items() if mode is not None}
    if chosen and has_adapter(policy):
        given = ", ".join(f"{part}={mode!r}" for part, mode in chosen.items())
        raise InvalidConfigError(
            f"{given}, but the policy has an adapter already, which says what is trained. Leave the tune_ arguments "
            f"out to train that adapter, or merge it first: merge_and_save(policy, folder)."
        )
    present = [part for part in policy.parameter_parts if policy.part_modules(part)]
    for part, mode in chosen.items():
        if part not in present:
            raise InvalidTuningError(
                f"{part}={mode!r}, but {type(policy).__name__} has no such part (its config and features decide). "
                f"It has: {', '.join(present) or 'none'}."
            )
        for module in policy.part_modules(part).values():
            module.requires_grad_(mode is True)
    _freeze_quantized(policy, chosen, present)
    targets, whole = [], set()
    for part in (part for part, mode in chosen.items() if mode == "lora"):
        found = lora_modules(policy, part)
        if not found:
            raise InvalidTuningError(_no_lora(policy, part, present))
        targets += found
        modules = policy.part_modules(part)
        whole |= {n for n in policy.modules_to_save if any(n == m or n.startswith(m + ".") for m in modules)}
    if targets:
        saved = sorted(whole | set(_trained_modules(policy)))
        add_adapter(policy, LoraConfig(target_modules=targets, modules_to_save=saved or None, **lora))


def _freeze_quantized(policy: PolicyModel, modes: Mapping[str, Mode], present: list[str]) -> None:
    """Freeze the modules that hold quantised weights, which an adapter alone can train."""
    quantised = quantized_names(policy)
    for part in present:
        for name, module in policy.part_modules(part).items():
            if not any(weight.startswith(name + ".") for weight in quantised):
                continue
            if modes.get(part) is True:
                raise InvalidTuningError(
                    f"{part}=True, but the weights of {name} are quantised and cannot be trained themselves. Put an "
                    f"adapter on them with {part}='lora', or load the policy without quantization_config."
                )
            module.requires_grad_(False)


def _no_lora(policy: PolicyModel, part: str, present: list[str]) -> str:
    """Return the message for a part without layers for LoRA."""
    others = [other for other in present if lora_modules(policy, other)]
    return (
        f"{part}='lora', but {type(policy).__name__} has no layers for LoRA in this part. Train it in full with "
        f"{part}=True, or freeze it with {part}=False. Parts with layers for LoRA: {', '.join(others) or 'none'}."
    )


def lora_modules(policy: PolicyModel, part: str) -> list[str]:
    """Return the names of the modules of a part that LoRA adapts."""
    ends = policy.lora_targets.get(part, ())
    kinds = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.Embedding)
    return [
        f"{name}.{inner}" if inner else name
        for name, module in policy.part_modules(part).items()
        for inner, child in module.named_modules()
        if isinstance(child, kinds) and f"{name}.{inner}".rstrip(".").endswith(ends)
    ]


def _trained_modules(module: nn.Module, name: str = "") -> list[str]:
    """Return the outermost modules that own trained parameters of their own, by name."""
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        if not name:
            raise InvalidConfigError(
                "A policy that owns parameters outside its modules cannot be trained beside LoRA."
            )
        return [name]
    return [
        found
        for child, inner in module.named_children()
        for found in _trained_modules(inner, f"{name}.{child}" if name else child)
    ]


def parameter_table(policy: PolicyModel) -> str:
    """Return a table of how many parameters each part has, and how many of them are trained."""
    places = {m: part for part in policy.parameter_parts for m in policy.part_modules(part)}
    counts: dict[str, list[int]] = {part: [0, 0, 0] for part in dict.fromkeys(places.values())}
    for name, parameter in policy.named_parameters():
        part = next((part for m, part in places.items() if name.startswith(m + ".")), "everything else")
        row = counts.setdefault(part, [0, 0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
        row[2] += parameter.numel() * is_adapter_parameter(name)
    counts["in all"] = [sum(row[i] for row in counts.values()) for i in range(3)]
    lines = [f"{'part':<22}{'parameters':>16}{'trained':>16}{'share':>9}  how"]
    for part, (held, trained, adapted) in counts.items():
        how = "frozen" if not trained else "adapter" if adapted else "in full"
        lines.append(f"{part:<22}{held:>16,}{trained:>16,}{trained / max(held, 1):>9.2%}  {how}")
    return "\n".join(lines)


def merge_and_save(
    policy: PolicyModel, folder: str | os.PathLike, processor: PolicyProcessor | None = None
) -> PolicyModel:
    """Save a policy with its adapter merged into the weights: a checkpoint that needs neither base nor peft.

    Args:
        policy: a policy with an adapter; it is not changed.
        folder: the folder to write to.
        processor: the policy's processor, saved with it together with a card; by default the one in the adapter's
            folder.

    Returns:
        The merged policy, equal up to rounding.

    Raises:
        InvalidConfigError: there is no adapter to merge.
    """
    if not has_adapter(policy):
        raise InvalidConfigError(
            f"{type(policy).__name__} has no adapter to merge; save it: policy.save_pretrained(…)."
        )
    whole = merged(policy)
    source = policy.loaded_from
    if processor is None and source is not None and source.is_adapter and (source.folder / PROCESSOR_NAME).is_file():
        processor = load_processor(policy)
    whole.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        write_checkpoint_card(Path(folder), base=base_of_adapter(policy))
    else:
        logger.warning(
            f"{folder} has no processor, without which a policy cannot run: merge_and_save(policy, folder, processor)."
        )
    return whole
