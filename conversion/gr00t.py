"""GR00T N1.5 and N1 as NVIDIA publishes them: config.json, sharded weights, robots in experiment_cfg/metadata.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .._files import read_json
from ..configuration.gr00t import GR00TConfig
from ..errors import CheckpointError, CorruptFileError, EmbodimentError, InvalidConfigError
from ..modeling.action_heads.flow_matching import FlowmatchingActionHead
from ..modeling.action_heads.flow_matching_1_5 import FlowmatchingActionHead_1_5
from ..modeling.backbones.eagle import EagleBackbone
from ..modeling.backbones.eagle_1_5 import EagleBackbone1_5
from ..modeling.policies.gr00t import GR00TPolicy
from ..modeling.policies.gr00t_n1 import GR00TN1Policy
from ..modeling.policies.gr00t_n1_5 import GR00TN1_5Policy
from ..processing.gr00t import GR00TProcessor
from ..processing.registry import processor_class
from .gr00t_metadata import Embodiment, read_embodiment
from .published_policy import PublishedPolicy, Weights, build_policy, read_weights
from .resnet import rename

logger = logging.get_logger(__name__)

# In transformers 5 the vision tower has lost a level; the language model stands here without its head.
RENAMES = [
    (r"^((?:.*\.)?vision_model\.)vision_model\.", r"\1"),
    (r"^((?:.*\.)?language_model\.)model\.", r"\1"),
]
EMBEDDING, LM_HEAD = "language_model.embed_tokens.weight", "language_model.lm_head.weight"
POOLING = "vision_model.head."
LAYERS = "language_model.layers."

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


def rename_gr00t_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return published GR00T weights under our names; other names stay as they are.

    Left out is what nothing reads: the vision tower's pooling, and the language model's head. Word embedding and head
    are tied when pretrained; a file that holds the head alone gives the embedding by it.
    """
    renamed = rename(state_dict, RENAMES)
    for name in [name for name in renamed if name.endswith(LM_HEAD)]:
        head = renamed.pop(name)
        renamed.setdefault(name.removesuffix(LM_HEAD) + EMBEDDING, head)
    return {name: value for name, value in renamed.items() if POOLING not in name}


def trim_gr00t_weights(weights: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return weights without the language model's layers that a policy or backbone does not keep."""
    backbone = module.backbone if isinstance(module, GR00TPolicy) else module
    return _first_layers(weights, getattr(backbone, "select_layer", None))


def _first_layers(weights: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    return {n: w for n, w in weights.items() if count is None or _layer(n) is None or _layer(n) < count}


def _layer(name: str) -> int | None:
    """Return which layer of the language model a weight belongs to; None for others."""
    _, found, rest = name.partition(LAYERS)
    return int(rest.partition(".")[0]) if found else None


def gr00t_fields(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields of our config that a published config.json has."""
    config_class = _kind(config).policy_class.config_class
    known = [*config_class.field_names(), "action_dim", "action_horizon", "hidden_size"]
    fields = {name: value for name, value in config.items() if name in known}
    left_out = sorted(set(config) - set(fields))
    logger.info(f"Fields of the published config.json that this library does not use: {', '.join(left_out)}")
    return fields


GR00T_N1_5 = PublishedPolicy(
    policy_class=GR00TN1_5Policy,
    components={"backbone.": EagleBackbone1_5, "action_head.": FlowmatchingActionHead_1_5},
    rename=rename_gr00t_weights,
    fields=gr00t_fields,
    trim=trim_gr00t_weights,
)
GR00T_N1 = PublishedPolicy(
    policy_class=GR00TN1Policy,
    components={"backbone.": EagleBackbone, "action_head.": FlowmatchingActionHead},
    rename=rename_gr00t_weights,
    fields=gr00t_fields,
    trim=trim_gr00t_weights,
)
KINDS = {kind.policy_class.config_class.model_type: kind for kind in (GR00T_N1_5, GR00T_N1)}


def _kind(config: Mapping[str, Any]) -> PublishedPolicy:
    return KINDS[config["model_type"]]


# --- whole checkpoints ------------------------------------------------------------------------------------


def is_config(config: Mapping[str, Any]) -> bool:
    """Tell NVIDIA's config.json from ours, which has the same model type, by the format version that it lacks."""
    return config.get("model_type") in list(KINDS) and "format_version" not in config  # whatever stands there


def read_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    source: str,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    embodiment: str | None = None,
    modes: str | Mapping[str, str] | None = None,
    keys: Sequence[str] | None = None,
    **overrides: Any,
) -> tuple[GR00TPolicy, GR00TProcessor | None]:
    """Load policy and processor from a folder as NVIDIA publishes it.

    Args:
        folder: with config.json, weights in one file or several, and experiment_cfg/metadata.json.
        config: the parsed config.json.
        source: for messages.
        dtype: of the weights; by default as config.json says, else as they are saved.
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
    kind = _kind(config)
    config_class = kind.policy_class.config_class
    robot = None
    if not {"input_features", "output_features"} & overrides.keys():
        robot = _find_robot(folder, embodiment, modes, keys, needed=with_processor or embodiment is not None)
    published = _read_shards(folder)
    weights = kind.rename(published)
    fields = kind.fields(config, weights) | (_robot_fields(robot) if robot else {})
    if embodiment is not None:
        overrides.setdefault("embodiment_tag", embodiment)
    policy_config = config_class.from_dict(fields, **overrides)
    _check_sizes(policy_config, weights, source)
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or next(iter(weights.values())).dtype
    policy = build_policy(
        kind.policy_class, policy_config, _first_layers(weights, policy_config.select_layer), source, dtype
    )
    if not with_processor:
        return policy, None
    if robot is None:
        raise CheckpointError(
            f"{source} records no statistics of a robot with the features that are given, so it cannot run there yet. "
            f"Load the policy with AutoPolicy.from_pretrained, and build a processor from a dataset's statistics: "
            f"{processor_class(policy_config).__name__}.from_config(policy.config, dataset.statistics)."
        )
    processor = processor_class(policy_config).from_config(
        policy_config, robot.statistics, tokenizer=tokenizer, rename_map=robot.rename_map
    )
    return policy, processor


def _find_robot(
    folder: Path,
    tag: str | None,
    modes: str | Mapping[str, str] | None,
    keys: Sequence[str] | None,
    needed: bool,
) -> Embodiment | None:
    """Return what the checkpoint records of a robot; None where none is chosen and none is needed."""
    try:
        robot = read_embodiment(folder, tag)  # finds it
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
    return read_embodiment(folder, robot.tag, modes or "min_max", keys)


def _robot_fields(robot: Embodiment) -> dict[str, Any]:
    """Return the fields of a config that say which robot it is."""
    return {
        "input_features": robot.input_features,
        "output_features": robot.output_features,
        "state_parts": robot.state_parts,
        "action_parts": robot.action_parts,
        "embodiment_tag": robot.tag,
    }


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all weight files of a folder; they stay on disk until they are used."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return read_weights(folder / SAFE_WEIGHTS_NAME)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CorruptFileError(index, "index of weights", "it has no weight_map")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(names.values())):
        tensors |= read_weights(folder / Path(file).name)  # a checkpoint must not reach outside its folder
    return tensors


def _check_sizes(config: GR00TConfig, weights: Weights, source: str) -> None:
    """Check the fields that a user may have changed against the weights, before all that differs is listed."""
    for field, (name, dimension) in SIZES.items():
        if name in weights and weights[name].shape[dimension] != getattr(config, field):
            held = weights[name].shape[dimension]
            raise InvalidConfigError(
                f"{field}={getattr(config, field)}, but the weights of {source} have {held}. Leave {field} at {held}: "
                f"a robot with fewer dimensions is padded, and set by input_features and output_features."
            )
    layers = [_layer(name) for name in weights if _layer(name) is not None]
    if layers and config.select_layer > max(layers) + 1:
        raise InvalidConfigError(
            f"select_layer={config.select_layer}, but {source} holds the language model's first {max(layers) + 1} "
            f"layers only."
        )
    projection = ("backbone.eagle_linear.weight", "backbone.linear.weight")
    if config.projects_features and not any(name in weights for name in projection):
        raise InvalidConfigError(
            f"The features are to be projected from {config.hidden_size} to {config.feature_dim}, but {source} holds "
            f"no weights for that: leave project_to_dim as published."
        )
