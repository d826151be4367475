"""Mixtures: several LeRobot datasets as one, each with its share of the samples.

Notation: n samples of a dataset, w its share of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ..configuration.features import ACTION
from ..configuration.mixture import (
    VECTORS,
    Member,
    config_fields,
    joined_features,
    knows_robots,
    require_embodiment_names,
    require_fit,
    robot_features,
    robots,
    same_names,
)
from ..errors import DatasetIndexError, MixtureError
from .dataset import LeRobotDataset
from .features import CAMERAS
from .policy_features import PolicyFeatures
from .statistics.computing import joined_statistics

WEIGHTS_BY = ("frames", "dataset")


class MixtureDataset(Dataset):
    """Read several datasets as one, in which each has a share of the samples that its weight decides.

    An epoch has as many slots as it takes for every dataset to be seen whole at least once. Each dataset owns its
    share of them, one after another, and slot k of s reads its sample ⌊k · n / s⌋: where a dataset has more slots than
    samples, each is seen equally often, give or take once. Nothing is drawn here, so that any sampler honours the
    weights and goes on where it was: a DataLoader that shuffles, transformers' Trainer, accelerate's shards. Shuffle:
    in order, the datasets come one after the other.

    A sample is that of its dataset, and `dataset_index`, a 0-d tensor, and `embodiment` (`str`), where robots have
    names. Cameras that some datasets lack are absent from their samples; widths are the datasets' own.

    Args:
        datasets (`Sequence[LeRobotDataset]`): each with the same action horizon, history and control rate; see the
            `delta_timestamps` of `LeRobotDataset`.
        weights (`Sequence[float]`, *optional*): one per dataset, all above 0; by default 1 each.
        weights_by (`str`, *optional*, defaults to `"frames"`): what is weighted. `"frames"`: every sample of a dataset
            has its weight, so that equal weights are every sample once. `"dataset"`: the dataset as a whole has, so
            that equal weights are equal shares, however long the datasets are.
        names (`Sequence[str]`, *optional*): of the datasets, for messages and logs; by default those of their folders.
        embodiments (`Sequence[str]`, *optional*): the robot of each dataset; by default all are of one that has no
            name. Policies that know robots keep statistics of each.
        fps (`float`, *optional*): the control rate [Hz] where samples hold single actions; otherwise their own.

    Raises:
        MixtureError: no datasets, one twice, weights that are no shares, samples whose steps or rates differ.
    """

    def __init__(
        self,
        datasets: Sequence[LeRobotDataset],
        weights: Sequence[float] | None = None,
        weights_by: Literal["frames", "dataset"] = "frames",
        names: Sequence[str] | None = None,
        embodiments: Sequence[str | None] | None = None,
        fps: float | None = None,
    ):
        self.datasets = list(datasets)
        _require_datasets(self.datasets)
        count = len(self.datasets)
        self.names = _names(self.datasets) if names is None else [str(name) for name in names]
        self.weights = [1.0] * count if weights is None else list(weights)
        self.embodiments = [None] * count if embodiments is None else list(embodiments)
        self.weights_by = weights_by
        for what, given in (("names", self.names), ("weights", self.weights), ("embodiments", self.embodiments)):
            if len(given) != count:
                raise MixtureError(f"There are {count} datasets and {len(given)} {what}: {given}", "Give one each")
        if len(set(self.names)) < count:
            raise MixtureError(f"Two datasets have one name: {', '.join(self.names)}", "Name them apart: names=[…]")
        require_embodiment_names(self.embodiments)
        self._slots = slots_of([len(dataset) for dataset in self.datasets], self.weights, weights_by, self.names)
        self._starts = np.concatenate([[0], np.cumsum(self._slots)])
        self._fps = fps
        _require_same_steps(self.datasets, self.names, fps)

    # --- what the mixture is --------------------------------------------------------------------------------

    @property
    def shares(self) -> list[float]:
        """The share of every dataset in the samples of an epoch; together 1."""
        return (self._slots / self._slots.sum()).tolist()

    @property
    def slots(self) -> list[int]:
        """The number of samples that every dataset has in an epoch."""
        return self._slots.tolist()

    @property
    def fps(self) -> float:
        """The control rate [Hz]: that of consecutive actions of a sample."""
        return self._fps or self.datasets[0].control_rate

    control_rate = fps

    @property
    def num_episodes(self) -> int:
        """Number of kept episodes in all datasets."""
        return sum(dataset.num_episodes for dataset in self.datasets)

    @property
    def num_frames(self) -> int:
        """Number of frames in the kept episodes of all datasets."""
        return sum(dataset.num_frames for dataset in self.datasets)

    @property
    def tasks(self) -> list[str]:
        """Every instruction of the datasets, each once."""
        return list(dict.fromkeys(task for dataset in self.datasets for task in dataset.tasks))

    @property
    def features(self) -> dict[str, dict]:
        """The features of all datasets, as the first one that has them declares them, vectors at their widest."""
        joined: dict[str, dict] = {}
        for dataset in self.datasets:
            for name, feature in dataset.features.items():
                known = joined.setdefault(name, feature)
                if name in VECTORS and tuple(feature["shape"]) > tuple(known["shape"]):
                    joined[name] = feature
        return joined

    @property
    def camera_names(self) -> list[str]:
        """The cameras of all datasets."""
        return [name for name, feature in self.features.items() if feature["dtype"] in CAMERAS]

    @property
    def members(self) -> list[Member]:
        """Each dataset as a policy sees it."""
        return [
            Member(name, embodiment, *dataset.policy_features, dataset.dimension_names, dataset.units)
            for name, embodiment, dataset in zip(self.names, self.embodiments, self.datasets, strict=True)
        ]

    @property
    def policy_features(self) -> PolicyFeatures:
        """The (inputs, outputs) of a policy for all datasets: every camera, and vectors at their widest.

        Raises:
            MixtureError: a vector that some datasets lack, or a camera of other channels.
        """
        return PolicyFeatures(*joined_features(self.members))

    @property
    def robots(self) -> dict[str | None, list[str]]:
        """Robot → the names of its datasets; the only one, where it has no name, is None."""
        return {robot: [member.name for member in own] for robot, own in robots(self.members).items()}

    def config_fields(self, config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a policy's config for this mixture; see `PolicyConfig.for_dataset`."""
        return config_fields(config_class, self.members, given)

    def require_fit(self, config: Any) -> None:
        """Check that one policy of a config can learn from all datasets.

        Raises:
            MixtureError: widths, cameras or the order of dimensions do not go together.
        """
        require_fit(config, self.members)

    # --- statistics -------------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Feature → min, max, mean, std and count over all datasets, each frame once; of vectors also quantiles.

        They are those of all data, however the datasets are weighted. Quantiles of cameras are left out: they cannot
        be had from those of the datasets.

        Raises:
            MixtureError: the datasets have vectors of different widths, which have no joint statistics.
            DatasetFormatError: see `LeRobotDataset.statistics`.
        """
        for name in VECTORS:
            if len({tuple(d.features[name]["shape"]) for d in self.datasets if name in d.features}) > 1:
                raise MixtureError(
                    f"{name} has different widths in {', '.join(self.names)}, so it has no joint statistics",
                    "Build the processor of a policy that knows robots: from_config(config, "
                    "**mixture.processor_fields(config))",
                )
        return joined_statistics(self.datasets)

    @cached_property
    def embodiment_statistics(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Robot → its statistics, joint of its datasets."""
        own = {robot: set(names) for robot, names in self.robots.items()}
        return {
            robot: joined_statistics([d for name, d in zip(self.names, self.datasets, strict=True) if name in names])
            for robot, names in own.items()
        }

    def knows_robots(self, config: Any) -> bool:
        """Return whether a policy of this config tells the robots of the mixture apart."""
        return knows_robots(config, self.members)

    def processor_fields(self, config: Any) -> dict[str, Any]:
        """Return the arguments of `from_config` of a policy's processor that follow from this mixture.

        Args:
            config: the policy's. One that knows robots gets statistics and features of each, others joint ones.

        Raises:
            MixtureError: one policy cannot learn from all datasets.
        """
        self.require_fit(config)
        used = (*config.input_features, *config.output_features)
        if self.knows_robots(config):
            described = robot_features(self.members)
            return {
                "embodiments": self.embodiment_statistics,
                "embodiment": None,  # chosen when it is loaded for one of them
                "embodiment_features": {
                    robot: {name: entry for name, entry in features.items() if name in used}
                    for robot, features in described.items()
                },
            }
        members = self.members
        vectors = [name for name in used if name in VECTORS]
        return {
            "statistics": self.statistics,
            "dimension_names": {name: same_names(members, "names", name) for name in vectors},
            "units": {name: same_names(members, "units", name) for name in vectors},
        }

    # --- samples ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | slice | Sequence[int]) -> dict:
        """Return one sample, or of a slice or list a batch of them; negative positions count from the end.

        A batch needs samples of one width and the same cameras.
        """
        if isinstance(index, slice):
            return default_collate(self.__getitems__(range(len(self))[index]))
        if np.ndim(index):
            return default_collate(self.__getitems__(index))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return the samples at `indices`; each dataset reads its own with one call."""
        owners, positions = self.locate(indices)
        samples: list[dict | None] = [None] * len(owners)
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            found = self.datasets[owner].__getitems__(positions[places].tolist())
            for place, sample in zip(places.tolist(), found, strict=True):
                sample["dataset_index"] = torch.tensor(owner)
                if self.embodiments[owner] is not None:
                    sample["embodiment"] = self.embodiments[owner]
                samples[place] = sample
        return samples

    def locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset, and the sample of it, at every position (n,) of the mixture.

        Raises:
            DatasetIndexError: a position that does not exist.
        """
        positions = np.asarray(indices)
        if positions.dtype.kind not in "iu":
            raise DatasetIndexError(
                f"A sample is chosen by a whole number, several by a slice or a list of them; got {indices!r:.200}."
            )
        positions = positions.astype(np.int64).reshape(-1)
        outside = positions[(positions < -len(self)) | (positions >= len(self))]
        if outside.size:
            raise DatasetIndexError(f"There is no sample {outside[0]}: the mixture has samples 0 … {len(self) - 1}.")
        positions = np.where(positions < 0, positions + len(self), positions)
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        lengths = np.array([len(dataset) for dataset in self.datasets], dtype=np.int64)
        return owners, (positions - self._starts[owners]) * lengths[owners] // self._slots[owners]

    def __repr__(self) -> str:
        lines = [f"MixtureDataset of {len(self.datasets)} datasets, {len(self)} samples at {self.fps:g} Hz"]
        for name, robot, share, dataset in zip(self.names, self.embodiments, self.shares, self.datasets, strict=True):
            of = f", robot {robot}" if robot else ""
            lines.append(f"  {share:6.1%}  {name}: {dataset.num_episodes} episodes, {dataset.num_frames} frames{of}")
        return "\n".join(lines)


def slots_of(
    lengths: Sequence[int], weights: Sequence[float], weights_by: str = "frames", names: Sequence[str] | None = None
) -> np.ndarray:
    """Return how many samples of an epoch each dataset has, int64: its share of the fewest that hold all of each.

    Args:
        lengths: samples of each dataset.
        weights, weights_by: see `MixtureDataset`.
        names: of the datasets, for messages.

    Raises:
        MixtureError: a weight is no positive number, or `weights_by` is neither.
    """
    names = [f"dataset {i}" for i in range(len(lengths))] if names is None else names
    if weights_by not in WEIGHTS_BY:
        raise MixtureError(f"weights_by={weights_by!r} is unknown", f"Choose one of {', '.join(WEIGHTS_BY)}")
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise MixtureError(
                f"The weight of {name} is {weight!r}; a weight is a number above 0", "Leave out what is not to be seen"
            )
    # Decimal numbers as they are written, so that 0.7 and 0.3 are seven to three and not a rounding off.
    exact = [Fraction(repr(weight)) for weight in weights]
    if weights_by == "frames":
        exact = [weight * length for weight, length in zip(exact, lengths, strict=True)]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    whole = max(math.ceil(length / share) for length, share in zip(lengths, shares, strict=True))
    if whole > np.iinfo(np.int64).max // max(lengths):
        raise MixtureError(
            f"The weights {list(weights)} are too far apart to be sampled", "Bring them closer together"
        )
    wanted = [share * whole for share in shares]
    slots = [math.floor(x) for x in wanted]
    # What is left goes to those that lost most by rounding down, the first of equal ones.
    losses = sorted(range(len(slots)), key=lambda i: (slots[i] - wanted[i], i))
    for i in losses[: whole - sum(slots)]:
        slots[i] += 1
    return np.array(slots, dtype=np.int64)


def _require_datasets(datasets: Sequence[Any]) -> None:
    if not datasets:
        raise MixtureError("A mixture of no datasets has no samples", "Give at least one LeRobotDataset")
    for dataset in datasets:
        if not isinstance(dataset, LeRobotDataset):
            raise MixtureError(
                f"A mixture is made of LeRobotDatasets; got {type(dataset).__name__}",
                "Choose episodes of one by LeRobotDataset(…, episodes=[…]); torch's ConcatDataset joins others",
            )
    seen: dict[tuple, Any] = {}
    for dataset in datasets:
        again = [e for e in dataset.episodes if (dataset.root, e) in seen]
        if again:
            raise MixtureError(
                f"{dataset.root} is in the mixture twice, with episode {again[0]} in both",
                "Give it more weight instead, or different episodes",
            )
        seen |= dict.fromkeys((dataset.root, episode) for episode in dataset.episodes)


def _names(datasets: Sequence[LeRobotDataset]) -> list[str]:
    """Return the shortest ends of the datasets' paths that tell them apart."""
    for depth in range(1, 1 + max(len(dataset.root.parts) for dataset in datasets)):
        names = ["/".join(dataset.root.parts[-depth:]) for dataset in datasets]
        if len(set(names)) == len(names):
            return names
    return [f"{names[i]} {i}" for i in range(len(names))]  # other episodes of one folder


def _require_same_steps(datasets: Sequence[LeRobotDataset], names: Sequence[str], fps: float | None) -> None:
    """Check that the samples of all datasets span the same times.

    Raises:
        MixtureError: control rates, horizons or histories differ.
    """
    rates = {name: dataset.control_rate for name, dataset in zip(names, datasets, strict=True)}
    if fps is not None:
        single = [len(dataset.time_windows.get(ACTION, ())) < 2 for dataset in datasets]
        rates = {name: fps if alone else rate for (name, rate), alone in zip(rates.items(), single, strict=True)}
        rates["fps"] = fps
    if len({round(rate, 6) for rate in rates.values()}) > 1:
        listed = ", ".join(f"{name} {rate:g} Hz" for name, rate in rates.items())
        common = math.gcd(*(round(rate) for rate in rates.values()))
        fits = all(abs(rate - round(rate)) < 1e-6 for rate in rates.values())
        one = f", such as {common}" if fits else ""
        raise MixtureError(
            f"The datasets have different control rates: {listed}",
            f"Read them all at one that divides each{one}: fps in a recipe's data (train: --data.fps), in Python "
            f"LeRobotDataset(…, delta_timestamps={{'action': [i / fps for i in range(horizon)]}})",
        )
    first = datasets[0].time_windows
    for name, dataset in zip(names[1:], datasets[1:], strict=True):
        for feature, times in dataset.time_windows.items():
            known = first.get(feature)
            if feature == ACTION and (len(known or ()) != len(times) or not np.allclose(known, times, atol=1e-6)):
                raise MixtureError(
                    f"{names[0]} has samples of {len(known or ())} actions, {name} of {len(times)} or at other times",
                    "Open all with the same action_horizon, n_obs_steps and delta_timestamps",
                )
