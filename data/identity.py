"""What tells a dataset from another: for a training that goes on, which must not see other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..configuration.features import ACTION
from .dataset import LeRobotDataset
from .features import CAMERAS
from .mixture import MixtureDataset
from .selection import runs
from .streaming.dataset import StreamingLeRobotDataset
from .windows import OBSERVATION_PREFIX

_ROWS = 65_536  # digested together: the digest depends on it


def identity_of(dataset: Dataset) -> dict[str, Any]:
    """Return what tells a dataset from another, as plain values; pictures are not looked at.

    Of a `LeRobotDataset`: its episodes, frames, samples, rate and features, and digests of its instructions and of
    every number that a policy reads; a million frames take about a second. A stream's numbers are not read for this;
    its commit or folder stands for them, and its order is part of it. Of a `MixtureDataset`: what each of its datasets
    has, and how much of an epoch. Of other datasets only the number of samples is known.
    """
    if isinstance(dataset, ConcatDataset):
        return {"datasets": [identity_of(part) for part in dataset.datasets]}
    if isinstance(dataset, Subset):
        return {"samples": _digest([json.dumps(list(map(int, dataset.indices))).encode()])} | {
            "dataset": identity_of(dataset.dataset)
        }
    if isinstance(dataset, MixtureDataset):
        parts = zip(dataset.names, dataset.embodiments, dataset.slots, dataset.datasets, strict=True)
        return {
            "mixture": {
                name: {"embodiment": robot, "samples_of_epoch": slots} | identity_of(part)
                for name, robot, slots, part in parts
            },
            "order": dataset.names,
        }
    if not isinstance(dataset, LeRobotDataset):
        return {"samples": len(dataset)} if hasattr(dataset, "__len__") else {}
    streams = isinstance(dataset, StreamingLeRobotDataset)
    used = [name for name in dataset.features if name == ACTION or name.startswith(OBSERVATION_PREFIX)]
    rate = {} if dataset.control_rate == dataset.fps else {"control_rate": dataset.control_rate}
    return rate | {
        "episodes": runs(dataset.episodes),
        "frames": dataset.num_frames,
        "samples": dataset.num_samples,
        "fps": dataset.fps,
        "features": {name: f"{dataset.features[name]['dtype']} {dataset.features[name]['shape']}" for name in used},
        "instructions": _digest(task.encode() for task in dataset.tasks),
        **(dataset.version_and_order if streams else {"values": _digest(_numbers(dataset, used))}),
    }


def _numbers(dataset: LeRobotDataset, names: Iterable[str]) -> Iterable[bytes]:
    """Yield the bytes of every vector of the kept episodes."""
    for name in sorted(names):
        if dataset.features[name]["dtype"] in (*CAMERAS, "string"):
            continue
        yield name.encode()
        for rows in dataset.row_blocks(_ROWS):
            yield np.ascontiguousarray(dataset.numbers(name, rows)).tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
