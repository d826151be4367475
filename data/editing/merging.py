"""Merge datasets of the same robot, rate and features into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import DatasetIndexError, UnknownDatasetFeatureError, nearest
from .agreement import common_info
from .compose import write_dataset
from .output import new_dataset
from .source import Source, open_source
from .videos import Piece


def merge_datasets(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    features: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    rename_map: Mapping[str, str] | None = None,
    robot_type: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the episodes of all `sources`, one after the other, as the new LeRobot dataset `output`; return it.

    Episodes are numbered anew; instructions with the same text become one. Packets of videos are copied into shared
    files, a new one where videos were encoded with other settings; no frame changes. Statistics of numbers are those
    of all of them; those of cameras are pooled from the episodes', without quantiles (`recompute_statistics` decodes
    the videos and has them).

    Args:
        sources (`Sequence[str | Path]`): folders or Hub ids of datasets of version 3.0, at least two.
        output (`str` or `Path`): the folder to create; it appears complete or not at all.
        features (`Sequence[str]`, *optional*): the features to keep, by their new names; all by default.
        drop (`Sequence[str]`, *optional*): the features to leave out; a dataset need not have them.
        rename_map (`Mapping[str, str]`, *optional*): name of a feature → its new name, in the datasets that have it.
        robot_type (`str`, *optional*): of the result, where the datasets call one robot by several names.
        progress (`bool`, *optional*, defaults to True): show progress bars.

    Raises:
        DifferentDatasetsError: rates, robots, or features' presence, types, shapes, names or units differ.
        OutputExistsError: `output` exists, or is or lies in a source.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError, VideoError: a source cannot be read.
        UnknownDatasetFeatureError, DatasetIndexError: an argument that fits no source, or fewer than two of them.
        FolderInUseError, DiskError: another run writes `output`, or the disk does not take it.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if len(sources) < 2:
        raise DatasetIndexError(f"Merging takes at least two datasets; got {', '.join(map(str, sources)) or 'none'}.")
    opened = _open_all(sources, features, drop, rename_map or {})
    if len({source.root for source in opened}) < len(opened):
        raise DatasetIndexError(f"A dataset is named twice: {', '.join(source.name for source in opened)}.")
    info = common_info(opened, robot_type)
    pieces = [Piece(source, source.every) for source in opened]
    with new_dataset(output, opened, f"a merge of {' and '.join(source.name for source in opened)}") as folder:
        for source, positions in pieces:
            source.fetch(positions)
        write_dataset(folder, "manipulators dataset merge", pieces, info, progress)
    return Path(output)


def _open_all(
    sources: Sequence[str | Path],
    features: Sequence[str] | None,
    drop: Sequence[str] | None,
    rename_map: Mapping[str, str],
) -> list[Source]:
    """Open every source with the names and features that it has; one that no source has is refused."""
    plain = [open_source(source) for source in sources]
    has = [set(source.features) for source in plain]
    for name in rename_map:
        if not any(name in names for names in has):
            raise UnknownDatasetFeatureError(
                f"rename_map names {name!r}, which no dataset has. {nearest(name, set.union(*has))}"
            )
    maps = [{old: new for old, new in rename_map.items() if old in names} for names in has]
    has = [{mapped.get(name, name) for name in names} for names, mapped in zip(has, maps, strict=True)]
    for argument, names in (("features", features), ("drop", drop)):
        for name in names or ():
            if not any(name in own for own in has):
                raise UnknownDatasetFeatureError(
                    f"{argument} names {name!r}, which no dataset has. {nearest(name, set.union(*has))}"
                )
    return [
        open_source(
            source.name,
            source.revision,
            mapped,
            None if features is None else [name for name in features if name in own],
            [name for name in drop or () if name in own],
        )
        for source, mapped, own in zip(plain, maps, has, strict=True)
    ]
