"""Read what NVIDIA's GR00T checkpoints record of their robots: `experiment_cfg/metadata.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_json
from ..configuration.features import ACTION, IMAGE_PREFIX, STATE, PolicyFeature
from ..errors import CheckpointError, EmbodimentError, MissingFeatureError, MissingFileError, UnknownFeatureError

_FILES = ("experiment_cfg/metadata.json", "metadata.json")
_VECTORS = {"state": STATE, "action": ACTION}


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
    modes: str | Mapping[str, str] = "min_max",
    keys: Sequence[str] | None = None,
) -> Embodiment:
    """Return what NVIDIA's metadata.json records of one robot.

    The file does not say how parts are normalised nor in which order the network sees them: that is in NVIDIA's data
    config, Python code that is not published with the weights. Where it differs from the defaults, say it here.

    Args:
        source: a checkpoint folder, the file, or its parsed content.
        tag: which robot; may be left out where there is only one.
        modes: one normalization mode for all parts, or by NVIDIA's names, `{"action.gripper": "binary"}`; parts that
            are not named take `min_max`.
        keys: NVIDIA's names of cameras and parts, `["video.ego_view", "state.arm", "action.arm"]`, in the network's
            order; by default all, in the file's.

    Raises:
        EmbodimentError: there is no such robot, or none is chosen of several.
        MissingFileError, CheckpointError: there is no file, or it holds something else.
        UnknownFeatureError: `modes` or `keys` name what the robot does not have.
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
        by_part = {} if isinstance(modes, str) else dict(modes)
        for key in (*keys, *by_part):
            if key not in known:
                raise UnknownFeatureError(key, known)
        default = modes if isinstance(modes, str) else "min_max"

        def named(kind: str) -> dict[str, Any]:
            names = [key.removeprefix(f"{kind}.") for key in keys if key.startswith(f"{kind}.")]
            return {name: modalities[kind][name] for name in names}

        parts = {
            kind: {
                name: {"width": described["shape"][0], "mode": by_part.get(f"{kind}.{name}", default)}
                for name, described in named(kind).items()
            }
            for kind in _VECTORS
        }
        cameras = {
            IMAGE_PREFIX + name: PolicyFeature("VISUAL", (described["channels"], *described["resolution"][::-1]))
            for name, described in named("video").items()  # width, then height
        }
        recorded = {
            feature: {name: statistics[kind][name] for name in parts[kind]} for kind, feature in _VECTORS.items()
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, UnknownFeatureError):
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


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    found = [path] if path.is_file() else [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise MissingFileError(f"{path} holds no {_FILES[0]}, in which NVIDIA records the robots of a checkpoint.")
    return found[0]
