"""ACTPolicy: predict a whole chunk of actions from one observation (Zhao et al. 2023, arXiv 2304.13705)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.act import ACTConfig
from ..action_heads.act import ACTActionHead
from ..backbones.act import ACTBackbone
from ..layers.masking import masked_mean
from ..policy import PolicyModel, PolicyOutput
from ..registry import register_policy


@register_policy("act_policy")
class ACTPolicy(PolicyModel):
    """Map one observation to a chunk of actions by a transformer, trained as a conditional VAE.

    Args:
        config (`ACTConfig`): with input and output features set.
    """

    config_class = ACTConfig
    parameter_parts = {
        "tune_visual": ("backbone.image_encoder",),
        "tune_projector": (
            "backbone.encoder_img_feat_input_proj",
            "backbone.encoder_latent_input_proj",
            "backbone.encoder_robot_state_input_proj",
            "backbone.encoder_env_state_input_proj",
            "backbone.encoder_1d_feature_pos_embed",
        ),
        "tune_diffusion_model": ("backbone.encoder", "action_head"),
    }
    # Attention has none: torch's fused module holds queries, keys and values in one matrix, which peft would merge and
    # take apart again at every pass.
    lora_targets = {
        "tune_visual": ("convolution",),
        "tune_projector": ("_input_proj",),
        "tune_diffusion_model": ("linear1", "linear2"),
    }
    modules_to_save = ("action_head.action_head",)
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]

    def __init__(self, config: ACTConfig):
        super().__init__(config)
        self.backbone = ACTBackbone(config)
        self.action_head = ACTActionHead(config)
        # As in the paper's code: Xavier in encoder and decoder, torch's defaults everywhere else.
        for module in (*self.backbone.encoder.modules(), *self.action_head.decoder.modules()):
            module.starts_xavier = True
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> PolicyOutput:
        """Predict a chunk; with `actions`, also the loss: L1, plus the latent's KL divergence while training.

        Args:
            pixel_values: (b, v, c, h, w) normalised images; a list of (b, c, h, w) where sizes differ.
            pixel_mask: (b, v) bool, False where an optional camera is absent.
            state: (b, s).
            environment_state: (b, e).
            actions: (b, h, a) normalised labels.
            action_is_pad: (b, h) bool, True where a step lies beyond the episode.
            noise: (b, L) of the latent's draw; drawn when None.
            return_loss: leave out the loss when False.

        Returns:
            `PolicyOutput` with `loss`, `losses` (`l1`, and with a VAE while training `kl`), `actions` (b, h, a).
        """
        observation = self.check_inputs(
            pixel_values=pixel_values, pixel_mask=pixel_mask, state=state, environment_state=environment_state
        )
        if actions is not None:
            self.check_actions(actions, action_is_pad)
        # 1. Where along the demonstrations' styles: z from the actions while training, the mean style otherwise.
        latent, mu, log_sigma_x2 = self.action_head.encode_latent(
            observation | {"actions": actions, "action_is_pad": action_is_pad}, noise
        )
        # 2. Observation and latent → features → chunk.
        features, positions, absent = self.backbone(latent, **observation)
        predicted = self.action_head(features, positions, absent)  # (b, h, a)
        if actions is None or not return_loss:
            return PolicyOutput(actions=predicted)
        # 3. Loss over the steps inside the episode.
        losses = {"l1": masked_mean((predicted - actions).abs(), action_is_pad)}
        loss = losses["l1"]
        if mu is not None:
            losses["kl"] = (-0.5 * (1 + log_sigma_x2 - mu**2 - log_sigma_x2.exp())).sum(-1).mean()
            loss = loss + self.config.kl_weight * losses["kl"]
        return PolicyOutput(loss=loss, losses=losses, actions=predicted)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "starts_xavier", False):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    init.xavier_uniform_(parameter)
        if isinstance(module, ACTActionHead) and self.config.use_vae:
            init.copy_(module.vae_encoder_pos_enc, module.vae_positions())
