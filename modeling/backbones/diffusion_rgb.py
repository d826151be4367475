"""DiffusionRgbEncoder: a camera's image to keypoints, the vision of Diffusion Policy.

Shapes: b batch, k keypoints. Source: Chi et al. 2023 (arXiv 2303.04137) and LeRobot's Diffusion Policy, whose
published parameter names are kept outside the ResNet.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ...configuration.diffusion import DiffusionConfig
from ...errors import InvalidConfigError, nearest
from ..layers.resnet import build_resnet, feature_map_size
from ..layers.spatial_softmax import SpatialSoftmax


class DiffusionRgbEncoder(nn.Module):
    """Encode images by a ResNet, a spatial softmax and a linear layer.

    Args:
        config: with at least one camera among its features.
        camera: the camera whose size the encoder is built for; by default the first. Other sizes work too.

    Raises:
        InvalidConfigError: the config is inconsistent, or has no such camera.
    """

    def __init__(self, config: DiffusionConfig, camera: str | None = None):
        super().__init__()
        config.validate()
        cameras = list(config.image_features)
        camera = camera or next(iter(cameras), None)
        if camera not in cameras:
            raise InvalidConfigError(
                f"DiffusionRgbEncoder needs a camera; the config's input_features have no {camera or 'camera'}. "
                f"{nearest(camera or '', cameras)} A lone encoder: DiffusionConfig(image_features=(3, 480, 640))."
            )
        self.resize_shape = config.resize_shape
        self.crop_shape = config.crop_shape
        self.crop_is_random = config.crop_is_random
        self.backbone = build_resnet(
            config.vision_backbone,
            config.vision_config,
            config.pretrained_backbone_weights,
            "group" if config.use_group_norm else "batch",
        )
        size = feature_map_size(self.backbone.config, config.seen_shape(camera)[1:])
        channels, keypoints = self.backbone.config.hidden_sizes[-1], config.spatial_softmax_num_keypoints
        self.pool = SpatialSoftmax(channels, keypoints, size)
        self.feature_dim = 2 * keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    def forward(self, images: torch.Tensor, crop_offset: torch.Tensor | None = None) -> torch.Tensor:
        """Return features (b, 2k), the keypoints' (x, y) mixed by a linear layer and a ReLU.

        Args:
            images: (b, c, h, w), normalised.
            crop_offset: (2,) row and column where the crop begins, the same for all images; by default drawn
                while training, if crops are random, else the centre.
        """
        images = self.crop(self.resize(images), crop_offset)
        # In the order that convolutions compute in.
        images = images.to(self.out.weight.dtype, memory_format=torch.channels_last)
        features = self.backbone(images).last_hidden_state
        keypoints = self.pool(features)  # (b, k, 2)
        return F.relu(self.out(keypoints.flatten(1)))

    def resize(self, images: torch.Tensor) -> torch.Tensor:
        """Return images of `resize_shape`, with antialiasing."""
        if self.resize_shape is None or tuple(images.shape[-2:]) == self.resize_shape:
            return images
        # At least in float32: on the CPU there is no antialiasing in half precision.
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        resized = F.interpolate(wide, self.resize_shape, mode="bilinear", antialias=True)
        return resized.to(images.dtype)

    def crop(self, images: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """Return crops (b, c, *crop_shape) of images (b, c, h, w)."""
        if self.crop_shape is None:
            return images
        (height, width), (rows, columns) = images.shape[-2:], self.crop_shape
        if offset is None and not (self.training and self.crop_is_random):
            top, left = round((height - rows) / 2), round((width - columns) / 2)
            return images[..., top : top + rows, left : left + columns]
        if offset is None:
            device = images.device
            offset = torch.cat(
                [torch.randint(room + 1, (1,), device=device) for room in (height - rows, width - columns)]
            )
        # By index: an offset that had to be known on the host would make it wait for the device.
        images = images.index_select(-2, offset[0] + torch.arange(rows, device=images.device))
        return images.index_select(-1, offset[1] + torch.arange(columns, device=images.device))
