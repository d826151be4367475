"""PartlyFrozen: modules of which the config says that parts are not trained."""

from __future__ import annotations

from torch import nn


class PartlyFrozen(nn.Module):
    """Leave some modules as they are in training; subclasses name them.

    A frozen module also stays in evaluation mode: its dropout and batch statistics are part of what was trained.
    """

    def frozen_modules(self) -> list[nn.Module]:
        """Return the modules that the config says are not trained."""
        return []

    def freeze(self) -> None:
        """Mark what the config says is not trained."""
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True):
        """Set training mode, except in modules that the config freezes and nobody has unfrozen."""
        super().train(mode)
        for module in self.frozen_modules():
            module.train(mode and any(parameter.requires_grad for parameter in module.parameters()))
        return self
