"""ACTPolicy: predict a whole chunk of actions from one observation (Zhao et al. 2023, arXiv 2304.13705)."""

from __future__ import annotations

import torch

from ...configuration.act import ACTConfig
from ..action_heads.act import ACTActionHead
from ..backbones.act import ACTBackbone
from ..losses import mean_over
from ..output import PolicyOutput
from ..policy import PolicyModel
from ..registry import register_policy
from ..seam import Draws, Labels, PolicyInputs, checked_draw


@register_policy("act_policy")
class ACTPolicy(PolicyModel):
    """Map one observation to a chunk of actions by a transformer, trained as a conditional VAE.

    Args:
        config (`ACTConfig`): with input and output features set.
    """

    config_class = ACTConfig
    per_sample_losses = ("kl",)

    def __init__(self, config: ACTConfig):
        super().__init__(config)
        self.backbone = ACTBackbone(config)
        self.action_head = ACTActionHead(config)
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
        inputs = PolicyInputs(pixel_values, pixel_mask, state, environment_state)
        return super().forward(inputs, Labels(actions, action_is_pad), Draws(noise), return_loss)

    def losses(
        self, inputs: PolicyInputs, labels: Labels, draws: Draws
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return the L1 loss and, with a VAE while training, the latent's KL divergence; the chunk; its error."""
        # 1. Where along the demonstrations' styles: z from the actions while training, the mean style otherwise.
        if self.training and self.config.use_vae:
            latent, mu, log_variance = self.action_head.sample_latent(
                labels.actions, labels.action_is_pad, inputs.state, draws.noise
            )
            kl = {"kl": (-0.5 * (1 + log_variance - mu**2 - log_variance.exp())).sum(-1).mean()}
        else:
            latent, kl = None, {}
            if draws.noise is not None:  # not used here, but it may not be another than training takes
                checked_draw("noise", draws.noise, (len(labels.actions), self.config.latent_dim))
        # 2. The chunk, and how far it is off.
        predicted = self.action_head.sample(self.backbone.encode(inputs, latent), inputs, draws)  # (b, h, a)
        error = (predicted - labels.actions).abs()
        l1 = mean_over(error, labels.action_is_pad, labels.action_mask, self.config.loss_over)
        return {"l1": l1} | kl, predicted, {"l1": error}
