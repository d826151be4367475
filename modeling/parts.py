"""Parts: what the components of a policy declare of themselves, collected by the policy.

A component (backbone, action head) may declare, by names inside itself: `parameter_parts`, the modules of each part
that can be tuned apart; `lora_targets`, where LoRA layers go in each; `modules_to_save`, what is trained whole beside
LoRA; `quantizable`, the modules whose layers may be quantised; `stages`, the methods that sampling consists of;
`no_split_modules`, classes of layers that stay on one device; `input_embeddings`, the embedding of its language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import ClassVar

from torch import nn

# The names of the `tune_*` arguments, under which parts are declared.
PARTS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model")


class Parts(nn.Module):
    """Collect what a policy's components declare; a subclass may declare all of it itself instead."""

    # The attributes that hold the components, in the order in which they are run.
    components: ClassVar[tuple[str, ...]] = ("backbone", "action_head")

    def post_init(self) -> None:
        """Initialise the weights, and collect what must stay on one device and which input all observations have."""
        config = self.config
        observed = (("state", config.state_dim), ("environment_state", config.environment_state_dim))
        always = [name for name, width in observed if width] or (["pixel_values"] if config.image_features else [])
        self.main_input_name = next(iter(always), self.main_input_name)
        if self._no_split_modules is None:
            declared = [getattr(module, "no_split_modules", ()) for module in self._components().values()]
            self._no_split_modules = list(dict.fromkeys(name for names in declared for name in names))
        super().post_init()
        # accelerate refuses to split a policy into layers of a class that it does not have.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _components(self) -> dict[str, nn.Module]:
        found = {name: getattr(self, name, None) for name in self.components}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def parameter_parts(self) -> dict[str, tuple[str, ...]]:
        """Modules that make up the parts that can be tuned apart, under the names of the `tune_*` arguments."""
        return self._collected("parameter_parts", lambda name, inner: f"{name}.{inner}".rstrip("."))

    @property
    def lora_targets(self) -> dict[str, tuple[str, ...]]:
        """Where LoRA layers go in each part: ends of module names."""
        return self._collected("lora_targets", lambda _, end: end)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that are trained whole if their part has LoRA."""
        declared = {name: getattr(module, "modules_to_save", ()) for name, module in self._components().items()}
        return tuple(f"{name}.{inner}".rstrip(".") for name, modules in declared.items() for inner in modules)

    @property
    def quantizable(self) -> dict[str, nn.Module]:
        """The modules whose layers may be quantised, by name: encoders and language models that this policy has."""
        declared = {name: getattr(module, "quantizable", ()) for name, module in self._components().items()}
        names = [f"{name}.{inner}" for name, modules in declared.items() for inner in modules]
        return self._existing(names)

    @property
    def stages(self) -> dict[str, str]:
        """The methods that sampling consists of, in order, by what each does: `compile` compiles them and
        `manipulators benchmark` times them. They take and return tensors, or containers of tensors."""
        declared = {name: getattr(module, "stages", {}) for name, module in self._components().items()}
        found = {stage: f"{name}.{path}" for name, stages in declared.items() for stage, path in stages.items()}
        return found or {"network": "forward"}

    def _collected(self, kind: str, full: Callable[[str, str], str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name, module in self._components().items():
            for part, inner in getattr(module, kind, {}).items():
                found[part] = tuple(dict.fromkeys((*found.get(part, ()), *(full(name, one) for one in inner))))
        return {part: found[part] for part in sorted(found, key=PARTS.index)}

    def part_modules(self, part: str) -> dict[str, nn.Module]:
        """Return the modules of a part that this policy has, by name; a config may leave some out."""
        found = self._existing(self.parameter_parts.get(part, ()))
        return {name: module for name, module in found.items() if any(True for _ in module.parameters())}

    def _existing(self, names: Iterable[str]) -> dict[str, nn.Module]:
        found = {}
        for name in names:
            with suppress(AttributeError):
                found[name] = self.get_submodule(name)
        return found

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the embedding of the policy's language model, which NEFTune, peft and accelerate's FSDP2 ask for."""
        found = [getattr(module, "input_embeddings", None) for module in self._components().values()]
        found = [module for module in found if module is not None]
        if found:
            return found[0]
        try:
            return super().get_input_embeddings()
        except NotImplementedError:
            return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the policy's language model; its width stays what it was."""
        old = self.get_input_embeddings()
        parent, _, name = next(name for name, module in self.named_modules() if module is old).rpartition(".")
        setattr(self.get_submodule(parent), name, value)

    def freeze_parts(self) -> None:
        """Mark the parameters that the config says are not trained; called again after loading, which forgets it."""
        for module in self._components().values():
            if hasattr(module, "freeze"):
                module.freeze()

    def train(self, mode: bool = True):
        """Set training mode; a part's modules that are frozen whole stay as they are at inference."""
        super().train(mode)
        if mode:
            for part in self.parameter_parts:
                for module in self.part_modules(part).values():
                    if not any(parameter.requires_grad for parameter in module.parameters()):
                        module.eval()
        return self
