"""GR00T N1.5 and N1 as NVIDIA publishes them: config.json, sharded weights, robots in experiment_cfg/metadata.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.gr00t import GR00TConfig
from ...configuration.strict import completed
from ...errors import CheckpointError, EmbodimentError, InvalidConfigError
from ...modeling.loading import read_weights
from ...modeling.policies.gr00t import GR00TPolicy
from ...processing.gr00t import GR00TProcessor
from ...processing.registry import processor_class
from ..gr00t import KINDS, first_layers, kind_of, layer_of
from ..gr00t_metadata import Embodiment, read_embodiment
from ..published_policy import Weights, build_policy

# Field of our config → a weight whose size it is, and in which dimension.
SIZES = {
    "action_dim": ("action_head.action_encoder.W1.W", 1),
    "max_state_dim": ("action_head.state_encoder.layer1.W", 1),
    "max_num_embodiments": ("action_head.state_encoder.layer1.W", 0),
}

_ARMS = ("left_arm", "right_arm", "left_hand", "right_hand", "waist")
_GENIE = ("left_arm_joint_position", "right_arm_joint_position", "left_effector_position", "right_effector_position")
_GENIE += ("head_position", "waist_position")
# What NVIDIA's data configs, which are code, say of the robots of the published weights: cameras and parts in the
# network's order.
KEYS: dict[str, Sequence[str]] = {
    "gr1": ("video.ego_view", *(f"{kind}.{part}" for kind in ("state", "action") for part in _ARMS)),
    "agibot_genie1": (
        *("video.top_head", "video.hand_left", "video.hand_right"),
        *(f"{kind}.{part}" for kind in ("state", "action") for part in _GENIE),
        "action.robot_velocity",
    ),
}
# The robot whose states are angles, of which the network sees sines and cosines.
ANGLES = "gr1"


def is_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is NVIDIA's: ours has the same model type, and a format version."""
    return config.get("model_type") in list(KINDS) and "format_version" not in config  # whatever stands there


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    loading: Mapping[str, Any],
    processor_fields: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    embodiment: str | None = None,
    modes: str | Mapping[str, str] | None = None,
    keys: Sequence[str] | None = None,
    **overrides: Any,
) -> tuple[Any, GR00TProcessor | None]:
    """Load policy and processor from a folder as NVIDIA publishes it.

    Args:
        checkpoint: with config.json, weights in one file or several, and experiment_cfg/metadata.json.
        loading: how the policy is loaded; its dtype is by default as config.json says, else as the weights are saved.
        processor_fields: fields of our processor to override.
        tokenizer: the Eagle model's, which the folder lacks; see `LanguageProcessor.from_config`.
        with_processor: leave the processor out when False, and then features too where no robot is chosen.
        embodiment: which of the recorded robots; may be left out where there is only one.
        modes, keys: how its parts are normalised, and which are used in which order, see `read_embodiment`; by
            default what is known of NVIDIA's own robots, else `min_max` and all.
        overrides: fields of our config, and short names of nested ones. With `input_features` and `output_features`
            the robot is not one of those recorded.

    Raises:
        InvalidConfigError: fields that the weights do not fit.
        EmbodimentError: no such robot, or none is chosen of several.
        MissingFileError, CorruptFileError, WeightsMismatchError, MissingTokenizerError.
    """
    config, folder, source = checkpoint.config, checkpoint.folder, checkpoint.source
    kind = kind_of(config)
    config_class = kind.policy_class.config_class
    robot = None
    if not {"input_features", "output_features"} & overrides.keys():
        robot = _find_robot(folder, embodiment, modes, keys, needed=with_processor or embodiment is not None)
    weights = kind.rename(read_weights(folder, checkpoint.variant))
    fields = kind.fields(config, weights) | (_robot_fields(robot) if robot else {})
    if embodiment is not None:
        overrides.setdefault("embodiment_tag", embodiment)
    policy_config = config_class.from_dict(fields, **overrides)
    _check_sizes(policy_config, weights, source)
    dtype = config.get("dtype") or config.get("torch_dtype") or next(iter(weights.values())).dtype
    kept = first_layers(weights, policy_config.select_layer)
    policy = build_policy(kind.policy_class, policy_config, kept, checkpoint, loading, dtype)
    if not with_processor:
        return policy, None
    if robot is None:
        raise CheckpointError(
            f"{source} records no statistics of a robot with the features that are given, so it cannot run there yet. "
            f"Load the policy with AutoPolicy.from_pretrained, and build a processor from a dataset's statistics: "
            f"{processor_class(policy_config).__name__}.from_config(policy.config, dataset.statistics)."
        )
    recorded = {"statistics": robot.statistics, "rename_map": robot.rename_map}
    own = completed(recorded, processor_fields or {})
    return policy, processor_class(policy_config).from_config(policy_config, tokenizer=tokenizer, **own)


def _policy_class(checkpoint: Checkpoint) -> type[GR00TPolicy]:
    return kind_of(checkpoint.config).policy_class


def _files(folder: Path) -> list[str]:
    return ["experiment_cfg/metadata.json"]


def _find_robot(
    folder: Path,
    tag: str | None,
    modes: str | Mapping[str, str] | None,
    keys: Sequence[str] | None,
    needed: bool,
) -> Embodiment | None:
    """Return what the checkpoint records of a robot; None where none is chosen and none is needed."""
    try:
        robot = read_embodiment(folder, tag, modes="min_max")  # finds it
    except (FileNotFoundError, EmbodimentError):
        if needed:
            raise
        return None
    known = [
        *(name.replace("observation.images.", "video.", 1) for name in robot.input_features if "images" in name),
        *(f"state.{part}" for part in robot.state_parts),
        *(f"action.{part}" for part in robot.action_parts),
    ]
    if keys is None:
        keys = [key for key in KEYS.get(robot.tag, ()) if key in known]
        kinds = {key.partition(".")[0] for key in keys}
        keys = keys if kinds == {"video", "state", "action"} else None
    if modes is None and robot.tag == ANGLES:
        modes = {f"state.{part}": "sin_cos" for part in robot.state_parts}
    if modes is None and robot.tag == "oxe_droid" and "eef_rotation" in robot.state_parts:
        raise InvalidConfigError(
            "NVIDIA turns the rotations of 'oxe_droid' into other coordinates in its own code, which is not done "
            "here. Convert them yourself, and say how parts are normalised: modes={'state.eef_rotation': 'identity'}."
        )
    return read_embodiment(folder, robot.tag, modes, keys)


def _robot_fields(robot: Embodiment) -> dict[str, Any]:
    """Return the fields of a config that say which robot it is."""
    return {
        "input_features": robot.input_features,
        "output_features": robot.output_features,
        "state_parts": robot.state_parts,
        "action_parts": robot.action_parts,
        "embodiment_tag": robot.tag,
    }


def _check_sizes(config: GR00TConfig, weights: Weights, source: str) -> None:
    """Check the fields that a user may have changed against the weights, before all that differs is listed."""
    for field, (name, dimension) in SIZES.items():
        if name in weights and weights[name].shape[dimension] != getattr(config, field):
            held = weights[name].shape[dimension]
            raise InvalidConfigError(
                f"{field}={getattr(config, field)}, but the weights of {source} have {held}. Leave {field} at {held}: "
                f"a robot with fewer dimensions is padded, and set by input_features and output_features."
            )
    layers = [layer_of(name) for name in weights if layer_of(name) is not None]
    if layers and config.select_layer > max(layers) + 1:
        raise InvalidConfigError(
            f"select_layer={config.select_layer}, but {source} holds the language model's first {max(layers) + 1} "
            f"layers only."
        )
    projection = ("backbone.eagle_linear.weight", "backbone.linear.weight")
    if config.projects_features and not any(name in weights for name in projection):
        raise InvalidConfigError(
            f"The features are to be projected from {config.hidden_size} to {config.features_width}, but {source} "
            f"holds no weights for that: leave project_to_dim as published."
        )


register_layout(
    Layout(
        name="NVIDIA GR00T",
        matches=is_config,
        policy_class=_policy_class,
        read=read_checkpoint,
        files=_files,
        arguments=("embodiment", "modes", "keys"),
    )
)
