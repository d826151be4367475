"""The ResNet trunk that encodes cameras, from transformers, with a norm that suits small batches."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import ResNetConfig, ResNetModel
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut

from ...configuration.resnet import RESNETS
from ...configuration.strict import part_config
from ...errors import InvalidConfigError, nearest

VISION_NORMS = ("batch", "frozen_batch", "group")
CHANNELS_PER_GROUP = 16


class FrozenBatchNorm2d(nn.Module):
    """Apply batch norm with fixed statistics and affine: all four are buffers, never updated, never trained."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d) -> "FrozenBatchNorm2d":
        """Freeze a trained batch norm at what it is."""
        frozen = cls(norm.num_features, norm.eps).to(norm.weight.device)
        if norm.weight.device.type != "meta":
            frozen.load_state_dict({name: getattr(norm, name) for name in frozen.state_dict()})
        return frozen

    def forward(self, x: torch.Tensor | None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return x (b, c, h, w), normalised; without x the factor and the summand (c,) of every channel."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return (scale, shift) if x is None else x * scale[:, None, None] + shift[:, None, None]


class ScaledConv2d(nn.Conv2d):
    """Convolve, with a factor and a summand for every channel of the result."""

    @classmethod
    def over(cls, conv: nn.Conv2d) -> "ScaledConv2d":
        """Return one that takes over the kernel of a convolution without bias."""
        size = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        scaled = cls(*size, bias=False, device="meta")
        scaled.weight = conv.weight
        return scaled

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None):
        """Return (b, c, h, w); scale and shift (c,) are folded into kernel and bias."""
        if scale is None:
            return super().forward(x)
        kernel = (self.weight * scale[:, None, None, None]).to(x.dtype)  # (c, c_in, k, k)
        return F.conv2d(x, kernel, shift.to(x.dtype), self.stride, self.padding)


class FrozenConvLayer(nn.Module):
    """Convolution, frozen batch norm and activation, with the norm folded into the convolution.

    The norm's factor goes into the kernel and its summand into the bias, which saves two passes over the image.
    Submodules keep the names they have in transformers' ResNet.

    Args:
        layer: transformers' layer with `convolution`, `normalization` and, shortcuts excepted, `activation`.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.convolution = ScaledConv2d.over(layer.convolution)
        self.normalization = FrozenBatchNorm2d.from_batch_norm(layer.normalization)
        self.normalization._is_hf_initialized = getattr(layer.normalization, "_is_hf_initialized", False)
        self.activation = getattr(layer, "activation", nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.convolution
        if not isinstance(conv, ScaledConv2d):  # wrapped by an adapter
            return self.activation(self.normalization(conv(x)))
        return self.activation(conv(x, *self.normalization(None)))  # (b, c, h, w)


def build_resnet(
    name: str, overrides: dict | None = None, pretrained: str | None = None, norm: str = "batch"
) -> ResNetModel:
    """Build a ResNet trunk (no pooling or classifier is used).

    Args:
        name: one of `RESNETS`, or any label when `overrides` describe the network.
        overrides: fields of `transformers.ResNetConfig` that replace those of `name`.
        pretrained: Hub id or folder of start weights. Not read while transformers loads a checkpoint (on the
            meta device), which holds the trained ones.
        norm: `"batch"` as transformers has it; `"frozen_batch"` fixes every batch norm at what it is, which keeps what
            a pretrained network has learned, and folds it into its convolution; `"group"` puts group norm in its
            place, which normalises from the first step of a network that starts from random weights, where frozen
            statistics of 0 and 1 would do nothing.

    Raises:
        InvalidConfigError: there is no such norm; the start weights cannot be loaded, belong to another network or
            to another norm.

    Source: Wu & He 2018 (arXiv 1803.08494) for group norm; 16 channels per group as in Diffusion Policy (Chi et al.
    2023, arXiv 2303.04137).
    """
    if norm not in VISION_NORMS:
        raise InvalidConfigError(f"norm={norm!r} does not exist. {nearest(norm, VISION_NORMS)}")
    if norm == "group" and pretrained is not None:
        raise InvalidConfigError(
            f"The start weights {pretrained!r} were trained with batch norm; with group norm they mean nothing. Start "
            f"from random weights (None), or keep the batch norm: norm='frozen_batch'."
        )
    config = part_config("vision_config", ResNetConfig, **(RESNETS.get(name, {}) | (overrides or {})))
    if pretrained is None or torch.get_default_device().type == "meta":
        resnet = ResNetModel(config)
    else:
        resnet = _load_start_weights(config, pretrained)
    for path, module in list(resnet.named_modules()):
        if norm == "frozen_batch" and isinstance(module, (ResNetConvLayer, ResNetShortCut)):
            resnet.set_submodule(path, FrozenConvLayer(module))
        elif norm == "group" and isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            resnet.set_submodule(path, nn.GroupNorm(max(1, channels // CHANNELS_PER_GROUP), channels))
    return resnet


def feature_map_size(config: ResNetConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the last feature map for images of (height, width)."""
    halvings = 1 + len(config.hidden_sizes) + bool(config.downsample_in_first_stage)  # stem, pool, all stages but one
    height, width = (-(-side // 2**halvings) for side in size)  # each halving rounds up
    return height, width


def _load_start_weights(config: ResNetConfig, pretrained: str) -> ResNetModel:
    remedy = "Set pretrained_backbone_weights=None to start from random weights, or to a folder that holds them."
    try:
        resnet, info = ResNetModel.from_pretrained(pretrained, output_loading_info=True, use_safetensors=True)
    except OSError as error:
        raise InvalidConfigError(f"The start weights {pretrained!r} could not be read: {error}\n{remedy}") from error
    shape = ("layer_type", "hidden_sizes", "depths", "embedding_size", "num_channels")
    differing = [field for field in shape if getattr(resnet.config, field) != getattr(config, field)]
    if differing or info["missing_keys"]:
        raise InvalidConfigError(
            f"The start weights {pretrained!r} are of another network: {', '.join(differing) or 'tensors'} differ "
            f"from the configured vision backbone. {remedy}"
        )
    return resnet
