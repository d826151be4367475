"""Layers that do in one kernel what several did, for sampling; on disk their names and values stay apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ...errors import FusedPolicyError


class JoinedLinear(nn.Module):
    """Apply several linear layers to one input: (…, d) → (…, sum of their widths), one behind the other.

    `state_dict` gives each its own weight under its own name, so that a checkpoint does not know of the joining.

    Args:
        layers: linear layers by name, beside which this one stands in their parent.

    Raises:
        FusedPolicyError: a layer is not a plain linear one, for example under an adapter or quantised.
    """

    def __init__(self, layers: dict[str, nn.Linear]):
        super().__init__()
        for name, layer in layers.items():
            if type(layer) is not nn.Linear:
                raise FusedPolicyError(f"{name} is a {type(layer).__name__}; only plain linear layers can be fused.")
        self.widths = {name: layer.out_features for name, layer in layers.items()}
        self.weight = nn.Parameter(torch.cat([x.weight.detach() for x in layers.values()]), requires_grad=False)
        biases = [x.bias.detach() for x in layers.values() if x.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise FusedPolicyError(f"Of {', '.join(layers)} some have a bias and some have none.")
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what all layers make of x (…, d)."""
        return F.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        own: dict[str, torch.Tensor] = {}
        super()._save_to_state_dict(own, "", keep_vars)
        parent = prefix[:-1].rpartition(".")[0]  # "….self_attn.qkv_proj." → "….self_attn"
        for kind, values in own.items():
            for name, part in zip(self.widths, values.split(list(self.widths.values())), strict=True):
                destination[".".join(filter(None, (parent, name, kind)))] = part

    def _load_from_state_dict(self, *args: object) -> None:
        raise FusedPolicyError("Weights cannot be loaded into a fused policy; load them first, then call fuse().")


class ResidualLinear(nn.Linear):
    """Apply a linear layer and add its result to the residual stream in the same kernel.

    Args:
        layer: the plain one, whose weight it takes over.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual (…, d) + layer(x)."""
        residual = residual if self.bias is None else residual + self.bias
        return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), self.weight.t()).view_as(residual)


class ScaledRMSNorm(nn.Module):
    """Apply Gemma's norm, x / rms(x) · (1 + weight) in float32, with 1 + weight computed beforehand.

    Args:
        norm: transformers' one, whose weight it takes over.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight
        self.register_buffer("scale", 1.0 + self.weight.detach().float(), persistent=False)

    def _apply(self, *args: object, **kwargs: object) -> ScaledRMSNorm:
        super()._apply(*args, **kwargs)
        self.scale = 1.0 + self.weight.detach().float()  # a cast to bfloat16 would have rounded it
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (…, d), normalised."""
        return F.rms_norm(x.float(), self.scale.shape, self.scale, self.eps).type_as(x)


def join(parent: nn.Module, name: str, parts: Sequence[str]) -> None:
    """Replace linear layers of a module by one, which gets this name."""
    joined = JoinedLinear({part: getattr(parent, part) for part in parts})
    for part in parts:
        delattr(parent, part)
    parent.add_module(name, joined)


def project_joined(parent: nn.Module, name: str, parts: Sequence[str], x: torch.Tensor) -> torch.Tensor:
    """Return what several linear layers of a module make of x (…, d), one behind the other, joined or not."""
    if hasattr(parent, name):
        return getattr(parent, name)(x)
    return torch.cat([getattr(parent, part)(x) for part in parts], dim=-1)


def add_linear(
    residual: torch.Tensor, layer: nn.Module, x: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """Return residual (…, d) + layer(x), in one kernel where the layer knows how; layer(x) times a gate, if given."""
    if gate is not None:
        return torch.addcmul(residual, layer(x), gate)
    return layer.add_to(residual, x) if isinstance(layer, ResidualLinear) else residual + layer(x)
