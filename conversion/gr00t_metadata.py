"""Read what NVIDIA's GR00T checkpoints record of their robots: `experiment_cfg/metadata.json`."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_json
from ..configuration.features import ACTION, IMAGE_PREFIX, STATE, PolicyFeature
from ..errors import (
    CheckpointError,
    EmbodimentError,
    InvalidConfigError,
    ManipulatorsError,
    MissingFeatureError,
    MissingFileError,
    UnknownFeatureError,
)
from .published_policy import require_known

_FILES = ("experiment_cfg/metadata.json", "metadata.json")
_VECTORS = {"state": STATE, "action": ACTION}
# What stands in the record of a robot, of a camera and of a part, and the statistics of a part. `fps`, `absolute` and
# `continuous` change no number here: NVIDIA's code reads them to fill episodes up and to choose checks.
_ROBOT = ("statistics", "modalities", "embodiment_tag")
_CAMERA = ("resolution", "channels", "fps")
_PART = ("shape", "rotation_type", "absolute", "continuous")
_WHICH = ("max", "min", "mean", "std", "q01", "q99")


@dataclass(frozen=True)
class Embodiment:
    """Hold what a checkpoint records of one robot, as the fields of a config and of a `GR00TProcessor`.

    Args:
        tag: the robot's name.
        input_features, output_features: cameras in their order, the state; the action.
        state_parts, action_parts: part → `{"width": …, "mode": …}`, in their order.
        statistics: of the parts, under the features' names.
        rename_map: NVIDIA's names of the cameras, `video.<camera>` → ours.
    """

    tag: str
    input_features: dict[str, PolicyFeature]
    output_features: dict[str, PolicyFeature]
    state_parts: dict[str, dict[str, Any]]
    action_parts: dict[str, dict[str, Any]]
    statistics: dict[str, dict[str, Any]]
    rename_map: dict[str, str]


def read_embodiment(
    source: str | os.PathLike | Mapping[str, Any],
    tag: str | None = None,
    modes: str | Mapping[str, str] | None = None,
    keys: Sequence[str] | None = None,
) -> Embodiment:
    """Return what NVIDIA's metadata.json records of one robot.

    The file does not say how parts are normalised nor in which order the network sees them: that is in NVIDIA's data
    config, Python code that is not published with the weights. Where it differs from the defaults, say it here.

    Args:
        source: a checkpoint folder, the file, or its parsed content.
        tag: which robot; may be left out where there is only one.
        modes: one normalization mode for all parts, or by NVIDIA's names, `{"action.gripper": "binary"}`; parts that
            are not named take `min_max`. A rotation has no default: NVIDIA turns it into other coordinates.
        keys: NVIDIA's names of cameras and parts, `["video.ego_view", "state.arm", "action.arm"]`, in the network's
            order; by default all, in the file's.

    Raises:
        EmbodimentError: there is no such robot, or none is chosen of several.
        MissingFileError, CheckpointError: there is no file, or it holds something else.
        UnknownFeatureError: `modes` or `keys` name what the robot does not have.
        InvalidConfigError: an entry that is not known, or a rotation for which no mode is given.
    """
    metadata = source if isinstance(source, Mapping) else read_json(_find(source))
    if tag is None and len(metadata) == 1:
        tag = next(iter(metadata))
    if tag not in metadata:
        raise EmbodimentError(tag, metadata, "records")
    try:
        modalities, statistics = metadata[tag]["modalities"], metadata[tag]["statistics"]
        known = [f"{kind}.{name}" for kind in ("video", *_VECTORS) for name in modalities[kind]]
        keys = known if keys is None else list(keys)
        by_part = dict(modes or {}) if not isinstance(modes, str) else {}
        for key in (*keys, *by_part):
            if key not in known:
                raise UnknownFeatureError(key, known)
        default = modes if isinstance(modes, str) else "min_max"

        def named(kind: str) -> dict[str, Any]:
            names = [key.removeprefix(f"{kind}.") for key in keys if key.startswith(f"{kind}.")]
            return {name: modalities[kind][name] for name in names}

        parts = {
            kind: {
                name: {"width": _width(described["shape"]), "mode": by_part.get(f"{kind}.{name}", default)}
                for name, described in named(kind).items()
            }
            for kind in _VECTORS
        }
        cameras = {
            IMAGE_PREFIX + name: PolicyFeature("VISUAL", (described["channels"], *described["resolution"][::-1]))
            for name, described in named("video").items()  # width, then height
        }
        _check_records(tag, metadata[tag], keys, known if isinstance(modes, str) else by_part)
        recorded = {
            feature: {name: statistics[kind][name] for name in parts[kind]} for kind, feature in _VECTORS.items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, ManipulatorsError):
            raise
        raise CheckpointError(f"The metadata of {tag!r} is not as NVIDIA writes it: {error!r}.") from error
    for kind in _VECTORS:
        if not parts[kind]:
            raise MissingFeatureError([f"{kind}.<part>"], keys, known)
    widths = {kind: sum(part["width"] for part in parts[kind].values()) for kind in _VECTORS}
    return Embodiment(
        tag=tag,
        input_features=cameras | {STATE: PolicyFeature("STATE", (widths["state"],))},
        output_features={ACTION: PolicyFeature("ACTION", (widths["action"],))},
        state_parts=parts["state"],
        action_parts=parts["action"],
        statistics=recorded,
        rename_map={name.replace(IMAGE_PREFIX, "video.", 1): name for name in cameras},
    )


def _check_records(tag: str, record: Mapping[str, Any], keys: Sequence[str], given: Collection[str]) -> None:
    """Check that every entry of a robot's record is known, and that every rotation among the keys is given a mode.

    Raises:
        InvalidConfigError: one is not.
    """
    file = f"metadata.json of {tag!r}"
    require_known(file, record, _ROBOT)
    modalities, statistics = record["modalities"], record["statistics"]
    require_known(f"{file}, modalities", modalities, ("video", *_VECTORS))
    require_known(f"{file}, statistics", statistics, _VECTORS)
    for key in keys:
        kind, _, name = key.partition(".")
        described = modalities[kind][name]
        require_known(f"{file}, {key}", described, _CAMERA if kind == "video" else _PART)
        if kind in _VECTORS:
            require_known(f"{file}, statistics of {key}", statistics[kind][name], _WHICH)
        rotation = described.get("rotation_type")
        if rotation is not None and key not in given:
            raise InvalidConfigError(
                f"{key} of {tag!r} is a rotation, rotation_type={rotation!r}. NVIDIA turns rotations into other "
                f"coordinates in its own code, which is not done here. Convert them yourself, and say how they are "
                f"normalised: modes={{{key!r}: 'identity'}}."
            )


def _width(shape: Any) -> int:
    """Return the width of a vector's shape; raises what a malformed record raises."""
    (width,) = shape
    return operator.index(width)


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    found = [path] if path.is_file() else [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise MissingFileError(f"{path} holds no {_FILES[0]}, in which NVIDIA records the robots of a checkpoint.")
    return found[0]
