"""What the features of other projects' datasets are called here: openpi's `state`, `actions` and `image`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ..configuration.features import ACTION, IMAGE_PREFIX, STATE, is_camera_name
from .features import CAMERAS

_VECTORS = {
    ACTION: ("actions",),
    STATE: ("state", "states", "observation.states", "observation/state", "proprio", "qpos"),
}
_PREFIXES = ("observation.", "observation/", "observations.", "observations/", "images.", "images/")


def suggested_names(features: Mapping[str, Mapping]) -> dict[str, str]:
    """Return `{name in the dataset: name that policies read}` of features whose names say what they are.

    Args:
        features (`Mapping[str, Mapping]`): name → its declaration.
    """
    suggested = {
        name: wanted
        for wanted, names in _VECTORS.items()
        if wanted not in features
        for name in [name for name in names if name in features][:1]
    }
    for name, feature in features.items():
        if feature["dtype"] in CAMERAS and not is_camera_name(name):
            camera = name
            for prefix in _PREFIXES:
                camera = camera.removeprefix(prefix)
            wanted = IMAGE_PREFIX + camera.strip("/").replace("/", "_")
            if wanted not in features and wanted not in suggested.values():
                suggested[name] = wanted
    return suggested


def how_to_rename(names: Mapping[str, str]) -> str:
    """Return the arguments that give features other names, in Python and on the command line."""
    pairs = ", ".join(f"{old!r}: {new!r}" for old, new in names.items())
    plain = ", ".join(f"{old}: {new}" for old, new in names.items())
    options = " ".join(shlex.quote(f"{old}={new}") for old, new in names.items())
    return f"rename_map={{{pairs}}} (train: --data.rename_map '{{{plain}}}', convert-dataset: --rename-map {options})"
