"""The names of GR00T N1.5 and N1 in the weights and config.json that NVIDIA publishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from ..errors import InvalidConfigError
from ..modeling.action_heads.flow_matching import FlowmatchingActionHead
from ..modeling.action_heads.flow_matching_1_5 import FlowmatchingActionHead_1_5
from ..modeling.backbones.eagle import EagleBackbone
from ..modeling.backbones.eagle_1_5 import EagleBackbone1_5
from ..modeling.policies.gr00t import GR00TPolicy
from ..modeling.policies.gr00t_n1 import GR00TN1Policy
from ..modeling.policies.gr00t_n1_5 import GR00TN1_5Policy
from .published_policy import PublishedPolicy, Weights, register_published, require_known
from .rename import rename

logger = logging.get_logger(__name__)

# In transformers 5 the vision tower has lost a level; the language model stands here without its head.
RENAMES = [
    (r"^((?:.*\.)?vision_model\.)vision_model\.", r"\1"),
    (r"^((?:.*\.)?language_model\.)model\.", r"\1"),
]
EMBEDDING, LM_HEAD = "language_model.embed_tokens.weight", "language_model.lm_head.weight"
POOLING = "vision_model.head."
LAYERS = "language_model.layers."
# Fields of the published config.json that change no action.
_HARMLESS = ("architectures", "attn_implementation", "model_type", "torch_dtype", "transformers_version")


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
    return first_layers(weights, getattr(backbone, "select_layer", None))


def first_layers(weights: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """Return weights without the language model's layers from `count` on."""
    return {n: w for n, w in weights.items() if count is None or layer_of(n) is None or layer_of(n) < count}


def layer_of(name: str) -> int | None:
    """Return which layer of the language model a weight belongs to; None for others."""
    _, found, rest = name.partition(LAYERS)
    return int(rest.partition(".")[0]) if found else None


def gr00t_fields(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields of our config that a published config.json has."""
    config_class = kind_of(config).policy_class.config_class
    known = [*config_class.field_names(), "action_dim", "action_horizon", "hidden_size"]
    fields = {name: value for name, value in config.items() if name in known}
    settled = {name for name in config if name not in fields and config_class.knows(name)}
    require_known("config.json", config, {*fields, *settled, *_HARMLESS})
    head = config.get("action_head_cfg")
    widths = {head[n] for n in ("action_dim", "max_action_dim") if n in head} if isinstance(head, Mapping) else ()
    if len(widths) > 1:
        raise InvalidConfigError(
            f"action_head_cfg has action_dim={head['action_dim']} and max_action_dim={head['max_action_dim']}, which "
            f"are one width. Give one of the two."
        )
    left_out = sorted(set(config) - set(fields))
    logger.info(f"Fields of the published config.json that this library does not use: {', '.join(left_out)}")
    return fields


GR00T_N1_5 = register_published(
    PublishedPolicy(
        policy_class=GR00TN1_5Policy,
        components={"backbone.": EagleBackbone1_5, "action_head.": FlowmatchingActionHead_1_5},
        rename=rename_gr00t_weights,
        fields=gr00t_fields,
        trim=trim_gr00t_weights,
    )
)
GR00T_N1 = register_published(
    PublishedPolicy(
        policy_class=GR00TN1Policy,
        components={"backbone.": EagleBackbone, "action_head.": FlowmatchingActionHead},
        rename=rename_gr00t_weights,
        fields=gr00t_fields,
        trim=trim_gr00t_weights,
    )
)
KINDS = {kind.policy_class.config_class.model_type: kind for kind in (GR00T_N1_5, GR00T_N1)}


def kind_of(config: Mapping[str, Any]) -> PublishedPolicy:
    """Return which of the two a config.json describes."""
    return KINDS[config["model_type"]]
