"""The one place where the dataset's vocabulary meets the network's: a component's door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configuration.features import ACTION, ENVIRONMENT_STATE, IMAGE_PREFIX, STATE
from ..configuration.policy import PolicyConfig
from ..errors import FeatureShapeError, MissingFeatureError

LABELS = ("actions", "action_is_pad", "action_mask")

_MODEL_NAMES = {STATE: "state", ENVIRONMENT_STATE: "environment_state", ACTION: "actions"}


def model_inputs(batch: Mapping[str, Any], config: PolicyConfig) -> dict[str, Any]:
    """Return model inputs for a batch in either vocabulary.

    Args:
        batch: `observation.state` (b, s), `observation.environment_state` (b, e), `observation.images` (a list
            of (b, c, h, w), one per camera, or (b, v, c, h, w)) or `observation.images.<camera>` each,
            `action` (b, h, a), `action_is_pad` (b, h); or the model's own names. With history (b, t, …).
        config: says which of them the network reads; others are left out.

    Raises:
        MissingFeatureError: an input of the network is absent.
        FeatureShapeError: another number of cameras, or another width, than the config says.
    """
    inputs = {_MODEL_NAMES.get(name, name): value for name, value in batch.items()}
    cameras = list(config.image_features)
    if "pixel_values" not in inputs:
        if "observation.images" in inputs:
            inputs["pixel_values"] = inputs["observation.images"]
        elif cameras and all(name in inputs for name in cameras):
            inputs["pixel_values"] = [inputs[name] for name in cameras]
    widths = {"state": config.model_state_dim, "environment_state": config.environment_state_dim}
    tokens = ["input_ids", "attention_mask"] if config.reads_instruction else []
    needed = [name for name, width in widths.items() if width] + (["pixel_values"] if cameras else []) + tokens
    needed = list(dict.fromkeys([*needed, *config.other_inputs]))
    missing = [name for name in needed if inputs.get(name) is None]
    if missing:
        raise MissingFeatureError(missing, batch, [*config.input_features, *tokens], "The input of the network")
    for name, width in widths.items():
        if width and inputs[name].shape[-1] != width:
            raise FeatureShapeError(name, tuple(inputs[name].shape), f"a last dimension of {width}")
    if cameras:
        views = len(inputs["pixel_values"]) if isinstance(inputs["pixel_values"], (list, tuple)) else None
        views = views or inputs["pixel_values"].shape[-4]
        if views != len(cameras):
            named = ", ".join(name.removeprefix(IMAGE_PREFIX) for name in cameras)
            raise FeatureShapeError("pixel_values", (views,), f"{len(cameras)} cameras: {named}")
    kept = (*needed, "pixel_mask", *LABELS)
    return {name: inputs[name] for name in kept if inputs.get(name) is not None}
