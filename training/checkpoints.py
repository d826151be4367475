"""Trainer checkpoints: which are deleted, which weights fit the model, and the progress of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import sort_checkpoints

from ..errors import CorruptFileError, MissingFileError
from ..modeling.loading import (
    read_shapes,
    read_tensors,
    read_types,
    require_finite,
    require_same_tensors,
    require_weight_types,
)

PROGRESS_FILE, EMA_FILE = "progress.safetensors", "ema.safetensors"


def surplus_checkpoints(
    run: str | os.PathLike, limit: int | None, best: str | None, keep_last: bool = True
) -> list[Path]:
    """Return the checkpoints beyond `limit`, oldest first; never the best one, nor with `keep_last` the last."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(run))]
    if not limit or limit < 0:
        return []
    kept = {*checkpoints[-1:]} if keep_last else set()
    kept |= {Path(best)} if best is not None else set()
    removable = [path for path in checkpoints if path not in kept]
    return removable[: max(0, len(checkpoints) - max(limit, len(kept)))]


def require_fitting_weights(folder: str | os.PathLike, model: torch.nn.Module) -> None:
    """Check that a checkpoint holds exactly the tensors of the model; transformers would accept a part of them.

    Raises:
        MissingFileError, CorruptFileError, WeightsMismatchError: the checkpoint has none, or others than the model.
        WeightsValueError: some are NaN, infinite, or no floating-point numbers.
    """
    paths = sorted(Path(folder).glob("model*.safetensors"))
    if isinstance(model, PeftModel):
        return  # the caller wrapped it, and peft itself compares the adapter's tensors
    if not paths:
        held = ", ".join(sorted(path.name for path in Path(folder).glob("*"))) or "nothing"
        raise MissingFileError(
            f"{folder} holds no model.safetensors to resume from; it holds {held}. Pickled weights are never read."
        )
    own = model.state_dict()
    require_same_tensors(folder, read_shapes(paths), own)
    require_weight_types(folder, read_types(paths), own)
    for path in paths:
        require_finite(path, read_tensors(path, backend="mmap"))


def save_progress(folder: str | os.PathLike, losses: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
    """Write the sums of the losses since the last log, and the position in the run as plain values."""
    tensors = {name: value.detach().cpu().clone() for name, value in losses.items()}
    save_file(tensors, Path(folder, PROGRESS_FILE), metadata={"format": "pt", "progress": json.dumps(progress)})


def load_progress(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return what `save_progress` wrote; None for a checkpoint without it.

    Raises:
        CorruptFileError: the file cannot be read.
    """
    path = Path(folder, PROGRESS_FILE)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            losses = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return losses, json.loads(file.metadata()["progress"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(path, "safetensors file", error) from error
