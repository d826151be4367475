"""Configuration of ACT, the Action Chunking Transformer (Zhao et al. 2023, arXiv 2304.13705)."""

import math
from typing import Any, ClassVar, Literal

from ..errors import InvalidConfigError, nearest
from .policy import PolicyConfig
from .resnet import RESNETS


class ACTConfig(PolicyConfig):
    """Configure ACT. Defaults are the paper's, as LeRobot publishes them.

    Args:
        chunk_size (`int`, *optional*, defaults to 100): actions predicted at once, the action horizon.
        n_action_steps (`int`, *optional*): actions executed before the next prediction; by default, and as the
            paper does, the whole chunk. A chunk that is executed whole stays so when `chunk_size` is assigned.
        vision_backbone (`str`, *optional*, defaults to `"resnet18"`): ResNet that encodes the cameras.
        vision_config (`dict`, *optional*): fields of `transformers.ResNetConfig` that differ from it.
        pretrained_backbone_weights (`str`, *optional*, defaults to `"microsoft/resnet-18"`): Hub id or folder
            of the ResNet's start weights for a policy trained from scratch; None starts from random ones.
        vision_norm (`str`, *optional*, defaults to `"frozen_batch"`): norm of the ResNet. `"frozen_batch"` keeps
            a pretrained batch norm as it is; a ResNet that starts from random weights trains with `"group"`.
        dim_model (`int`, *optional*, defaults to 512): width d of the transformer.
        n_decoder_layers (`int`, *optional*, defaults to 1): the original code configures 7 but, through a slip,
            uses the output of the first; 1 is what the published results were made with.
        use_vae (`bool`, *optional*, defaults to True): learn a latent style variable from the actions.
        kl_weight (`float`, *optional*, defaults to 10): weight of the KL divergence in the loss.
        temporal_ensemble_coeff (`float`, *optional*): average overlapping chunks with weights exp(-m·i), i = 0
            the oldest; the paper's m is 0.01. Needs `n_action_steps=1`.
    """

    model_type = "act_policy"
    horizon_field: ClassVar[str] = "chunk_size"

    chunk_size: int = 100
    n_action_steps: int | None = None

    vision_backbone: str = "resnet18"
    vision_config: dict[str, Any] | None = None
    pretrained_backbone_weights: str | None = "microsoft/resnet-18"
    vision_norm: Literal["frozen_batch", "group"] = "frozen_batch"
    replace_final_stride_with_dilation: bool = False

    pre_norm: bool = False
    dim_model: int = 512
    n_heads: int = 8
    dim_feedforward: int = 3200
    feedforward_activation: Literal["relu", "gelu"] = "relu"
    n_encoder_layers: int = 4
    n_decoder_layers: int = 1
    dropout: float = 0.1

    use_vae: bool = True
    latent_dim: int = 32
    n_vae_encoder_layers: int = 4
    kl_weight: float = 10.0

    temporal_ensemble_coeff: float | None = None

    @property
    def features_width(self) -> int:
        """Width of the features that the backbone gives."""
        return self.dim_model

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of the KL divergence: `kl_weight`."""
        return {"kl": self.kl_weight}

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return the latent's draw `noise` (b, L), which only training needs; always the same."""
        import torch

        if not (training and self.use_vae):
            return {}
        return {"noise": torch.randn(batch_size, self.latent_dim, generator=torch.Generator().manual_seed(1))}

    def validate_history(self) -> None:
        """Check that no observation history is asked for: ACT looks at the current observation only."""
        if self.n_obs_steps != 1:
            raise InvalidConfigError(f"n_obs_steps={self.n_obs_steps}: ACT looks at 1 observation only.")

    def validate_horizon(self) -> None:
        """Check that no more actions are executed than predicted, one at a time when ensembling."""
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise InvalidConfigError(
                f"n_action_steps={self.n_action_steps} must lie between 1 and chunk_size={self.chunk_size}."
            )
        coefficient = self.temporal_ensemble_coeff
        if coefficient is not None and not (math.isfinite(coefficient) and -coefficient * self.chunk_size < 80):
            raise InvalidConfigError(
                f"temporal_ensemble_coeff={coefficient} gives no finite weights for {self.chunk_size} steps. "
                f"The paper's value is 0.01; None switches the average off."
            )
        if self.temporal_ensemble_coeff is not None and self.n_action_steps != 1:
            raise InvalidConfigError(
                f"temporal_ensemble_coeff={self.temporal_ensemble_coeff} averages a prediction of every step, so "
                f"it needs n_action_steps=1, not {self.n_action_steps}."
            )

    def validate_widths(self) -> None:
        """Check that the transformer's widths can be built."""
        for name in ("dim_model", "n_heads", "dim_feedforward", "latent_dim"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.dim_model % self.n_heads:
            raise InvalidConfigError(f"dim_model={self.dim_model} must be a multiple of n_heads={self.n_heads}.")
        if self.image_features and self.dim_model % 4:
            raise InvalidConfigError(
                f"dim_model={self.dim_model} must be a multiple of 4: the position of a pixel is encoded by sine "
                f"and cosine of two axes."
            )
        if not 0 <= self.dropout < 1:
            raise InvalidConfigError(f"dropout={self.dropout} must lie in [0, 1).")
        if not 0 <= self.kl_weight < math.inf:
            raise InvalidConfigError(f"kl_weight={self.kl_weight} must be a finite number, at least 0.")

    def validate_vision(self) -> None:
        """Check that the image encoder exists."""
        if self.vision_backbone not in RESNETS and not self.vision_config:
            raise InvalidConfigError(
                f"vision_backbone={self.vision_backbone!r} is not known. {nearest(self.vision_backbone, RESNETS)} "
                f"Another ResNet is described by vision_config={{'hidden_sizes': …, 'depths': …, …}}."
            )
        if self.vision_norm == "group" and self.pretrained_backbone_weights is not None:
            raise InvalidConfigError(
                f"vision_norm='group' cannot use pretrained_backbone_weights={self.pretrained_backbone_weights!r}, "
                f"which were trained with batch norm. Set pretrained_backbone_weights=None, or "
                f"vision_norm='frozen_batch'."
            )
        if self.replace_final_stride_with_dilation:
            raise InvalidConfigError(
                "replace_final_stride_with_dilation=True is not supported: transformers' ResNet has no dilation."
            )
