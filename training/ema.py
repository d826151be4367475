"""WeightAverage: an exponential moving average of a policy's weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..errors import CorruptFileError, MissingFileError
from ..modeling.loading import read_shapes, require_finite, require_same_tensors
from ..modeling.sharding import as_split, gathered, is_split, local, split_like
from .checkpoints.folders import EMA_FILE


class WeightAverage:
    """Average a module's trainable parameters over the steps of training, in float32.

    Update t = 0, 1, … keeps 1 − (1 + t / inv_gamma)^(−power) of the average, at most `decay`: the first one copies
    the weights, later ones keep more of the average. Buffers and frozen parameters are not averaged.

    Args:
        module: the module whose trainable parameters are averaged.
        decay: the largest share of the average that an update keeps, in [0, 1).
        power, inv_gamma: the growth of the share, as in the formula.
        update_after_step: updates before this one only copy the weights.

    Source: Chi et al. 2023 (arXiv 2303.04137), with power 0.75, decay 0.9999; the arithmetic is diffusers' `EMAModel`.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        power: float = 0.75,
        inv_gamma: float = 1.0,
        update_after_step: int = 0,
    ):
        self._module = module
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._average = EMAModel(
            self._held(),
            decay=decay,
            power=power,
            inv_gamma=inv_gamma,
            update_after_step=update_after_step,
            use_ema_warmup=True,
            foreach=True,
        )
        self._average.to(dtype=torch.float32)
        self._is_applied = False

    def _held(self) -> list[torch.Tensor]:
        """Return what this process holds of the parameters: under FSDP2 a part, which is averaged by itself."""
        if not is_split(self._weights):
            return list(self._weights.values())
        for module in self._module.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.reshard()  # whole weights, gathered before, are not read again
        # EMAModel averages what a gradient may reach, and copies the rest.
        return [local(weight).requires_grad_() for weight in self._weights.values()]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The average as far as this process holds it, by parameter name."""
        return dict(zip(self._weights, self._average.shadow_params, strict=True))

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """Return the average, of split parameters in the first process only; called in every process."""
        if not is_split(self._weights):
            return self.tensors
        return gathered({name: as_split(value, self._weights[name]) for name, value in self.tensors.items()})

    @property
    def updates(self) -> int:
        """Number of steps averaged so far."""
        return self._average.optimization_step

    def update(self) -> None:
        """Update the average with the current weights."""
        self._average.step(self._held())

    def copy_to_weights(self) -> None:
        """Copy the average into the parameters, in their own dtype."""
        self._average.copy_to(self._held())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights inside the block, and its own weights back afterwards."""
        if self._is_applied:  # by a block around this one
            yield
            return
        self._average.store(self._held())
        self._is_applied = True
        try:
            self.copy_to_weights()
            yield
        finally:
            self._average.restore(self._held())
            self._is_applied = False

    def load(self, folder: str | os.PathLike) -> None:
        """Load the average of a checkpoint.

        Raises:
            MissingFileError, CorruptFileError, WeightsMismatchError: it has none, or one of other parameters.
            WeightsValueError: some are NaN or infinite.
        """
        path = Path(folder, EMA_FILE)
        if not path.is_file():
            raise MissingFileError(
                f"{folder} holds no {EMA_FILE}, because its run did not average weights. Resume without "
                f"ema_decay, or start a new run with it."
            )
        require_same_tensors(path, read_shapes([path]), self._weights)
        try:
            with safe_open(path, framework="pt") as file:
                updates = int(file.metadata()["updates"])
            saved = load_file(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(path, "average of weights", error) from error
        require_finite(path, saved)
        for name, value in self.tensors.items():
            value.copy_(local(split_like(saved[name], self._weights[name])))
        self._average.optimization_step = updates
