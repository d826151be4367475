"""Open the demonstrations of a recipe: one dataset or a mixture, recorded first where they do not exist yet."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...configuration.features import ACTION
from ...configuration.policy import PolicyConfig
from ...data.dataset import LeRobotDataset
from ...data.layouts.reader import load_metadata
from ...data.mixture import MixtureDataset
from ...data.source import fetch_metadata
from ...data.streaming.dataset import StreamingLeRobotDataset
from ...data.windows import OBSERVATION_PREFIX
from ...errors import InvalidRecipeError, UnknownDatasetFeatureError, nearest
from .recipe import DataSection, MixtureEntry, Recipe

logger = logging.getLogger(__name__)

Demonstrations = LeRobotDataset | MixtureDataset


def open_dataset(
    recipe: Recipe, config: PolicyConfig | None = None, features: list[str] | None = None
) -> Demonstrations:
    """Open the recipe's demonstrations, recorded first when they do not exist and the recipe says how.

    Without a config, which a base brings, samples hold one step: enough for features and statistics.

    Args:
        recipe: see `load_recipe`.
        config: of the policy, which says how many steps a sample holds.
        features: those to read; by default those of the recipe. Of a mixture each dataset reads those that it has.

    Raises:
        InvalidRecipeError: a dataset is another than the recipe would record, or has no rate that fits.
        MixtureError: the datasets cannot be one mixture.
    """
    for entry in recipe.data.entries:
        _record(entry)
    if not recipe.data.mixture:
        (only,) = recipe.data.entries
        return _open(recipe, only, config, _chosen(recipe, only, features), *_stream(recipe.data))
    entries = recipe.data.entries
    chosen = [_chosen(recipe, entry, features) for entry in entries]
    chosen = _those_that_exist(entries, chosen)
    return MixtureDataset(
        [_open(recipe, entry, config, names) for entry, names in zip(entries, chosen, strict=True)],
        weights=[entry.weight for entry in entries],
        weights_by=recipe.data.weights_by,
        names=_names(entries),
        embodiments=[entry.embodiment for entry in entries],
        fps=recipe.data.fps,
    )


def _record(entry: MixtureEntry) -> None:
    if entry.is_to_record:
        from ...evaluation.demonstrations import record_demonstrations

        record = entry.record
        record_demonstrations(record.environment, record.episodes, entry.dataset, seed=record.seed)


def _chosen(recipe: Recipe, entry: MixtureEntry, features: list[str] | None) -> list[str] | None:
    """Return the features to read of a dataset, None for all."""
    if features is not None:
        return features
    chosen = entry.features if recipe.inputs is None else recipe.inputs
    return None if chosen is None else list(dict.fromkeys([*chosen, ACTION]))


def _those_that_exist(entries: Sequence[MixtureEntry], chosen: list[list[str] | None]) -> list[list[str] | None]:
    """Return the features of each dataset without cameras that only others have.

    Raises:
        UnknownDatasetFeatureError: one that no dataset has.
    """
    existing = [_recorded_names(entry) for entry in entries]
    everywhere = list(dict.fromkeys(name for names in existing for name in names))
    for name in dict.fromkeys(name for names in chosen for name in names or ()):
        if name not in everywhere:
            raise UnknownDatasetFeatureError(
                f"No dataset of the mixture has a feature {name!r}. {nearest(name, everywhere)}"
            )
    return [
        names if names is None else [name for name in names if name in own]
        for names, own in zip(chosen, existing, strict=True)
    ]


def _recorded_names(entry: MixtureEntry) -> list[str]:
    return list(_metadata(entry).features)


def _metadata(entry: MixtureEntry) -> Any:
    return load_metadata(fetch_metadata(entry.dataset, entry.revision)[0], entry.rename_map)


def _stream(data: DataSection) -> tuple[type[LeRobotDataset], dict[str, Any]]:
    """Return the class of dataset that is asked for, and the arguments that a stream has beside."""
    options = {name: getattr(data, name) for name in ("shuffle_buffer", "cache_gb", "cache_folder")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not data.streaming:
        raise InvalidRecipeError(
            f"data: {', '.join(options)} belong to a stream. Set streaming: true, or leave them out."
        )
    return (StreamingLeRobotDataset, options) if data.streaming else (LeRobotDataset, {})


def _open(
    recipe: Recipe,
    entry: MixtureEntry,
    config: PolicyConfig | None,
    features: list[str] | None,
    kind: type[LeRobotDataset] = LeRobotDataset,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> LeRobotDataset:
    dataset = kind(
        entry.dataset,
        features=features,
        episodes=entry.episodes,
        revision=entry.revision,
        tolerance_s=entry.tolerance_s,
        rename_map=entry.rename_map,
        decoded_cache=entry.decoded_cache,
        **options,
        **_windows(recipe, entry, config, features),
    )
    record = entry.record
    if record is not None and entry.episodes is None and dataset.num_episodes != record.total_episodes:
        raise InvalidRecipeError(
            f"{entry.dataset} exists and holds {dataset.num_episodes} episodes; the recipe records "
            f"{record.total_episodes}. Choose another folder, --data.dataset with --data.record.episodes, or remove "
            f"it."
        )
    return dataset


def _windows(
    recipe: Recipe, entry: MixtureEntry, config: PolicyConfig | None, features: list[str] | None
) -> dict[str, Any]:
    """Return the arguments of a dataset that say how many steps a sample holds, and which samples there are.

    Raises:
        InvalidRecipeError: the dataset's rate is no multiple of the recipe's.
    """
    horizon, history, dropped = 1, 1, 0
    if config is not None:
        horizon, history, dropped = config.action_horizon, config.n_obs_steps, config.frames_without_start
    counts = {"action_horizon": horizon, "n_obs_steps": history}
    if recipe.data.fps is None:
        return counts | {"drop_n_last_frames": dropped}
    metadata = _metadata(entry)
    stride = round(metadata.fps / recipe.data.fps)
    if stride < 1 or not math.isclose(stride * recipe.data.fps, metadata.fps, rel_tol=1e-6):
        rate = round(metadata.fps)
        fits = [f"{rate / i:g}" for i in range(1, min(rate, 60) + 1) if rate % i == 0]
        raise InvalidRecipeError(
            f"{entry.dataset} has {metadata.fps:g} frames per second, which is no multiple of fps: "
            f"{recipe.data.fps:g}. Of it one can read {', '.join(fits)}; name a rate that every dataset can be read "
            f"at, or leave the dataset out."
        )
    if stride == 1:
        return counts | {"drop_n_last_frames": dropped}
    first = 1 - history
    times = {ACTION: [(first + i) / recipe.data.fps for i in range(horizon)]}
    if history > 1:
        read = metadata.features if features is None else features
        observed = [name for name in read if name.startswith(OBSERVATION_PREFIX)]
        times |= {name: [i / recipe.data.fps for i in range(first, 1)] for name in observed}
    return {"delta_timestamps": times, "drop_n_last_frames": dropped * stride}


def _names(entries: Sequence[MixtureEntry]) -> list[str] | None:
    """Return the names of the datasets: as given, Hub ids as they are, of folders the last part."""
    names = [
        entry.name or (Path(entry.dataset).name if Path(entry.dataset).is_dir() else entry.dataset)
        for entry in entries
    ]
    return names if len(set(names)) == len(names) else [entry.name or entry.dataset for entry in entries]
