"""What datasets must have in common to become one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from ...errors import DifferentDatasetsError
from ..features import CAMERAS, INDEX_FEATURES
from ..selection import flat_names
from .source import Source

# What the format records of how videos were encoded: datasets may differ in it.
_ENCODING = ("info", "video_info")


def common_info(sources: Sequence[Source], robot_type: str | None = None) -> dict:
    """Return the info.json of a dataset that holds episodes of all `sources`.

    Args:
        sources: of which the first decides the order of the features.
        robot_type: of the whole; by default the one that all have.

    Raises:
        DifferentDatasetsError: they differ in rate, robot, or in a feature's presence, type, shape, names or units.
    """
    first = sources[0]
    problems: list[str] = []
    for other in sources[1:]:
        problems += _differences(first, other, robot_type is None)
    if problems:
        raise DifferentDatasetsError(problems)
    features = {name: _merged([source.features[name] for source in sources]) for name in first.features}
    info = {
        key: value
        for key, value in first.metadata.info.items()
        if all(source.metadata.info.get(key) == value for source in sources[1:])
    }
    sizes = ("data_files_size_in_mb", "video_files_size_in_mb")
    info |= {key: first.metadata.info[key] for key in sizes if key in first.metadata.info}
    return info | {
        "fps": first.metadata.info["fps"],
        "robot_type": first.metadata.robot_type if robot_type is None else robot_type,
        "features": features,
    }


def _differences(first: Source, other: Source, compare_robots: bool) -> list[str]:
    """Return what differs between two datasets, each with the line that mends it."""
    problems = []
    if first.metadata.fps != other.metadata.fps:
        problems.append(
            f"fps: {first.metadata.fps:g} of {first.name}, {other.metadata.fps:g} of {other.name}. Frames are not "
            f"resampled: merge datasets of one rate each."
        )
    if compare_robots and first.metadata.robot_type != other.metadata.robot_type:
        problems.append(
            f"robot_type: {first.metadata.robot_type!r} of {first.name}, {other.metadata.robot_type!r} of "
            f"{other.name}. If it is one robot, say how it is called: --robot-type NAME"
        )
    problems += _absent(first, other)
    for name, ours in first.features.items():
        theirs = other.features.get(name)
        if theirs is None or name in INDEX_FEATURES:
            continue
        for key in ("dtype", "shape"):
            if ours[key] != theirs[key]:
                problems.append(
                    f"{name}: {key} {ours[key]} of {first.name}, {theirs[key]} of {other.name}. Leave it out of the "
                    f"result: --drop {name}"
                )
        for key in () if ours["dtype"] in CAMERAS else ("names", "units"):
            if flat_names(ours.get(key)) != flat_names(theirs.get(key)):
                problems.append(
                    f"{name}: {key} {_listed(ours.get(key))} of {first.name}, {_listed(theirs.get(key))} of "
                    f"{other.name}. If they mean the same, correct meta/info.json; else --drop {name}"
                )
    return problems


def _absent(first: Source, other: Source) -> list[str]:
    """Return a line for every feature that one of two datasets lacks, and the option that mends it."""
    problems = []
    for has, lacks in ((first, other), (other, first)):
        for name, feature in has.features.items():
            if name in lacks.features:
                continue
            alike = [
                candidate
                for candidate, found in lacks.features.items()
                if candidate not in has.features and all(found[key] == feature[key] for key in ("dtype", "shape"))
            ]
            rename = (
                f"if it is {alike[0]} there: --rename-map {shlex.quote(f'{alike[0]}={name}')}; or " if alike else ""
            )
            problems.append(
                f"{name}: {has.name} has it, {lacks.name} does not; {rename}leave it out: --drop {shlex.quote(name)}"
            )
    return problems


def _merged(declared: Sequence[Mapping]) -> dict:
    """Return the declaration of a feature; of how videos were encoded only what is the same in all, else None."""
    merged = dict(declared[0])
    for key in _ENCODING:
        found = [feature.get(key) for feature in declared]
        if isinstance(found[0], Mapping) and any(other != found[0] for other in found[1:]):
            others = [other if isinstance(other, Mapping) else {} for other in found[1:]]
            merged[key] = {
                name: value if all(other.get(name) == value for other in others) else ({} if value == {} else None)
                for name, value in found[0].items()
            }
    return merged


def _listed(names: object) -> str:
    found = flat_names(names)
    return "none" if found is None else f"({', '.join(found)})"
