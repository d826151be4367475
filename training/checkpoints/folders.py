"""Trainer checkpoints: which are deleted, which weights fit the model, and the progress of a run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..._disk import full_disk_message
from ...errors import CorruptFileError, DiskFullError, DivergedWeightsError, ManipulatorsError, MissingFileError
from ...modeling.loading import (
    not_finite,
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


def last_checkpoint(run: str | os.PathLike) -> str | None:
    """Return the latest finished checkpoint in a run's folder; None where there is none."""
    return get_last_checkpoint(run) if os.path.isdir(run) else None


@contextmanager
def naming_a_full_disk(run: str | os.PathLike) -> Iterator[None]:
    """Turn the error of a checkpoint that a full disk does not take into one that says what stays.

    torch and safetensors report a full disk in many words and without the system's number, so the disk is asked.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ManipulatorsError) or _takes_more(run):
            raise
        last = last_checkpoint(run)
        kept = f"{last} stays; go on from it with --resume, or resume_from_checkpoint=True." if last else ""
        raise DiskFullError(full_disk_message(Path(run), kept)) from error


def _takes_more(folder: str | os.PathLike, size: int = 2**20) -> bool:
    """Return whether a folder's disk takes a file of `size` bytes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
    except OSError:
        return False
    return True


def require_finite_state(
    folder: str | os.PathLike,
    run: str | os.PathLike,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check that what a training is about to write is finite; parts that other processes hold are theirs to check.

    Args:
        folder: what is about to be written.
        run: the folder of the run's checkpoints.
        model, optimizer: of the training.
        average: averaged weights by name.

    Raises:
        DivergedWeightsError: a weight, an averaged weight or a number of the optimizer is NaN or infinite.
    """
    parameters = dict(model.named_parameters())
    tensors = parameters | {f"{name} (averaged)": value for name, value in (average or {}).items()}
    names = {parameter: name for name, parameter in parameters.items()}
    for parameter, state in getattr(optimizer, "state", {}).items():
        name = names.get(parameter, "a parameter")
        tensors |= {f"{name} ({kind} of the optimizer)": v for kind, v in state.items() if torch.is_tensor(v)}
    if bad := not_finite(tensors):
        raise DivergedWeightsError(folder, bad, last_checkpoint(run))


def save_progress(folder: str | os.PathLike, losses: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
    """Write the sums of the losses since the last log, and the position in the run as plain values."""
    tensors = {name: value.detach().cpu().clone() for name, value in losses.items()}
    save_file(tensors, Path(folder, PROGRESS_FILE), metadata={"format": "pt", "progress": json.dumps(progress)})


def save_average(folder: str | os.PathLike, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
    """Write ema.safetensors: averaged weights by name, and of how many steps they are."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(folder, EMA_FILE), metadata={"format": "pt", "updates": str(updates)})


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
