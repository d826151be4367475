"""The registry of components that compose: type → class of a backbone or an action head.

A component of this library is built from a complete config, one from outside from the policy's config and its fields:
`Backbone(config, **fields)` and `ActionHead(config, width, **fields)`, where `width` is that of the features.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..configuration.composed import ACTION_HEADS, BACKBONES, ComposedConfig
from ..errors import InvalidConfigError
from .action_heads.act import ACTActionHead
from .action_heads.diffusion import UnetActionHead
from .action_heads.flow_matching import FlowmatchingActionHead
from .action_heads.flow_matching_1_5 import FlowmatchingActionHead_1_5
from .backbones.act import ACTBackbone
from .backbones.diffusion import DiffusionBackbone
from .backbones.eagle import EagleBackbone
from .backbones.eagle_1_5 import EagleBackbone1_5

# Type → what builds the component from its complete config; a head is given the features' width too.
_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "act": ACTBackbone,
    "diffusion": DiffusionBackbone,
    "eagle": EagleBackbone.from_config,
    "eagle_1_5": EagleBackbone1_5.from_config,
}
_ACTION_HEADS: dict[str, Callable[..., nn.Module]] = {
    "act": lambda config, width: ACTActionHead(config),
    "diffusion": UnetActionHead,
    "flow_matching": lambda config, width: FlowmatchingActionHead(config),
    "flow_matching_1_5": lambda config, width: FlowmatchingActionHead_1_5(config),
}


def register_backbone(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register the decorated backbone, which follows `seam.Backbone`, for `ComposedPolicy`.

    Args:
        name: the type in `ComposedConfig(backbone={"type": name})`.

    Raises:
        InvalidConfigError: the name is taken.
    """
    return _register(name, _BACKBONES, BACKBONES)


def register_action_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register the decorated action head, which follows `seam.ActionHead`, for `ComposedPolicy`.

    Args:
        name: the type in `ComposedConfig(action_head={"type": name})`.

    Raises:
        InvalidConfigError: the name is taken.
    """
    return _register(name, _ACTION_HEADS, ACTION_HEADS)


def _register(name: str, classes: dict, configs: dict) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(component: type[nn.Module]) -> type[nn.Module]:
        known = classes.get(name)
        if known is not None and getattr(known, "__qualname__", None) != component.__qualname__:
            raise InvalidConfigError(f"The component type {name!r} is taken; choose another name.")
        classes[name], configs[name] = component, None
        return component

    return register


def build_backbone(config: ComposedConfig) -> nn.Module:
    """Return the backbone of a composed policy.

    Raises:
        InvalidConfigError: it does not go with the action head.
    """
    name, fields = config.component("backbone")
    complete = config.backbone_config
    backbone = _BACKBONES[name](config, **fields) if complete is None else _BACKBONES[name](complete)
    if complete is None:
        config.backbone_width = backbone.width
    return backbone


def build_action_head(config: ComposedConfig, width: int) -> nn.Module:
    """Return the action head of a composed policy for features of a width.

    Raises:
        InvalidConfigError: it does not go with the backbone.
    """
    name, fields = config.component("action_head")
    complete = config.head_config
    build = _ACTION_HEADS[name]
    return build(config, width, **fields) if complete is None else build(complete, width)
