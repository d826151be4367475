"""PI0FlowMatching: π0's network, which turns noise into actions by following a learned velocity.

Shapes: b batch, v cameras, n tokens of the prefix (pictures, then words), h action horizon, s and a the padded widths
of state and action, d PaliGemma's width, w the expert's. Time runs from 1, noise, to 0, actions. Source: Black et al.
2024 (arXiv 2410.24164) and openpi, whose parameter names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ...configuration.pi0 import PI0PolicyConfig
from ...errors import FeatureShapeError, InvalidConfigError
from ..backbones.paligemma_with_expert import PaliGemmaWithExpertModel


def block_mask(prefix_mask: torch.Tensor, horizon: int) -> torch.Tensor:
    """Return who sees whom (b, n + 1 + h, n + 1 + h), for the prefix's real tokens (b, n) bool.

    Inside a block all see each other; a block sees those before it. Padding is seen by none; what it sees itself
    does not matter, so it sees what its block does, and no row is empty.

                   prefix   state   actions
        prefix       ✓
        state        ✓        ✓
        actions      ✓        ✓        ✓
    """
    b, n = prefix_mask.shape
    block = torch.tensor([0] * n + [1] + [2] * horizon, device=prefix_mask.device)  # (n + 1 + h,)
    real = torch.cat([prefix_mask, prefix_mask.new_ones(b, 1 + horizon)], dim=1)  # (b, n + 1 + h)
    return (block[:, None] >= block) & real[:, None]


def encode_time(time: torch.Tensor, width: int, min_period: float, max_period: float) -> torch.Tensor:
    """Return sines and cosines (b, width) of the flow time (b,), with periods spaced evenly in their logarithm.

    Computed in float64: the shortest period is 1/250 of the whole, where float32 loses four digits of the result.
    """
    exact = torch.float32 if time.device.type == "mps" else torch.float64  # Apple's GPU knows no float64
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=exact, device=time.device)
    period = min_period * (max_period / min_period) ** fraction  # (width / 2,)
    angle = time[:, None].to(exact) * (2 * math.pi / period)  # (b, width / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(time.dtype)


class PI0FlowMatching(nn.Module):
    """Learn and follow the velocity from actions to noise, given pictures, an instruction and the robot's state.

    Args:
        config (`PI0PolicyConfig`): its widths are the padded ones.

    Raises:
        InvalidConfigError: the config is inconsistent.
    """

    def __init__(self, config: PI0PolicyConfig):
        super().__init__()
        config.validate()
        self.config = config
        backbone = config.backbone_config()
        w = backbone.gemma_expert_config.hidden_size
        self.state_proj = nn.Linear(config.max_state_dim, w)
        self.action_in_proj = nn.Linear(config.max_action_dim, w)
        self.action_time_mlp_in = nn.Linear(2 * w, w)
        self.action_time_mlp_out = nn.Linear(w, w)
        self.action_out_proj = nn.Linear(w, config.max_action_dim)
        self.paligemma_with_expert = PaliGemmaWithExpertModel(backbone)
        self.freeze()

    def freeze(self) -> None:
        """Mark what is never trained, besides what the config says: the backbone's parts that no loss depends on.

        Data-parallel training waits for the gradient of every parameter that is.
        """
        self.paligemma_with_expert.freeze()
        for module in self.paligemma_with_expert.prefix_tail():
            module.requires_grad_(False)

    # --- tokens -----------------------------------------------------------------------------------------

    def embed_prefix(
        self,
        images: Sequence[torch.Tensor] | torch.Tensor,
        img_masks: Sequence[torch.Tensor] | torch.Tensor | None,
        lang_tokens: torch.Tensor,
        lang_masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prefix (b, n, d), one camera after the other and then the words, and which are real (b, n)."""
        images = images if isinstance(images, torch.Tensor) else torch.stack(list(images), dim=1)  # (b, v, 3, h, w)
        b, v = images.shape[:2]
        if img_masks is None:
            img_masks = torch.ones(b, v, dtype=torch.bool, device=images.device)
        elif not isinstance(img_masks, torch.Tensor):
            img_masks = torch.stack(list(img_masks), dim=1)  # (b, v)
        if lang_masks is None:
            lang_masks = torch.ones_like(lang_tokens, dtype=torch.bool)
        words = self.paligemma_with_expert.embed_language_tokens(lang_tokens)  # (b, words, d)
        pictures = self.paligemma_with_expert.embed_image(images.flatten(0, 1))  # (b · v, tokens, d)
        real_pictures = img_masks.bool().repeat_interleave(pictures.shape[1], dim=1)  # (b, v · tokens)
        pictures = pictures.unflatten(0, (b, v)).flatten(1, 2).to(words.dtype)  # (b, v · tokens, d)
        prefix = torch.cat([pictures, words], dim=1)
        return prefix, torch.cat([real_pictures, lang_masks.bool()], dim=1)

    def embed_suffix(self, state: torch.Tensor, noisy_actions: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the suffix (b, 1 + h, w): the state (b, s), then actions (b, h, a) mixed with the flow time (b,)."""
        dtype = self.state_proj.weight.dtype
        state = state[:, -1] if state.ndim == 3 else state  # (b, s)
        widths = {"state": (state, self.config.max_state_dim), "actions": (noisy_actions, self.config.max_action_dim)}
        for name, (x, width) in widths.items():
            if x.shape[-1] != width:
                raise FeatureShapeError(name, tuple(x.shape), f"a last dimension of {width}, padded with zeros")
        state = self.state_proj(state.to(dtype))  # (b, w)
        actions = self.action_in_proj(noisy_actions.to(dtype))  # (b, h, w)
        time = encode_time(time, actions.shape[-1], self.config.min_period, self.config.max_period)  # (b, w)
        time = time.to(actions.dtype)[:, None].expand_as(actions)
        mixed = F.silu(self.action_time_mlp_in(torch.cat([actions, time], dim=-1)))
        return torch.cat([state[:, None], self.action_time_mlp_out(mixed)], dim=1)

    def _velocity(self, suffix: torch.Tensor) -> torch.Tensor:
        """Return the velocity (b, h, a) that the expert's output (b, 1 + h, w) stands for."""
        return self.action_out_proj(suffix[:, 1:].to(self.action_out_proj.weight.dtype)).float()

    # --- training ---------------------------------------------------------------------------------------

    def sample_time(self, batch_size: int, device: torch.device | str) -> torch.Tensor:
        """Draw flow times (b,): more often close to 1, since what noise is to become is the harder question."""
        config = self.config
        parameters = torch.tensor([config.time_sampling_beta_alpha, config.time_sampling_beta_beta], device=device)
        drawn = torch.distributions.Beta(*parameters).sample((batch_size,))
        return drawn * config.time_sampling_scale + config.time_sampling_offset

    def forward(
        self,
        images: Sequence[torch.Tensor] | torch.Tensor,
        img_masks: Sequence[torch.Tensor] | torch.Tensor | None,
        lang_tokens: torch.Tensor,
        lang_masks: torch.Tensor | None,
        state: torch.Tensor,
        actions: torch.Tensor,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the squared error (b, h, a) of the velocity between actions and noise, float32 and unreduced.

        Args:
            images: one (b, 3, h, w) in [-1, 1] per camera, or (b, v, 3, h, w).
            img_masks: one (b,) bool per camera, or (b, v), False where it is absent; None: all are there.
            lang_tokens: (b, n) token ids.
            lang_masks: (b, n), 0 or False where padded; None: nowhere.
            state: (b, s), or with history (b, t, s), of which the last is read.
            actions: (b, h, a) normalised labels.
            noise: (b, h, a) standard normal numbers; drawn when None.
            time: (b,) flow times; drawn when None.

        Raises:
            FeatureShapeError: state or actions do not have their padded width.
        """
        actions = actions.float()
        noise = torch.randn_like(actions) if noise is None else noise.float()
        time = self.sample_time(len(actions), actions.device) if time is None else time.float()
        t = time[:, None, None]  # (b, 1, 1)
        noisy = t * noise + (1 - t) * actions  # (b, h, a)

        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        suffix = self.embed_suffix(state, noisy, time)
        real_suffix = real.new_ones(suffix.shape[:2])  # (b, 1 + h)
        positions = torch.cat([real, real_suffix], dim=1).cumsum(dim=1) - 1  # (b, n + 1 + h): padding takes none
        (_, suffix), _ = self.paligemma_with_expert(
            block_mask(real, actions.shape[1]), positions, inputs_embeds=[prefix, suffix], prefix_output=False
        )
        return F.mse_loss(self._velocity(suffix), noise - actions, reduction="none")

    # --- inference --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_actions(
        self,
        images: Sequence[torch.Tensor] | torch.Tensor,
        img_masks: Sequence[torch.Tensor] | torch.Tensor | None,
        lang_tokens: torch.Tensor,
        lang_masks: torch.Tensor | None,
        state: torch.Tensor,
        noise: torch.Tensor | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        """Return actions (b, h, a): the velocity followed from noise, in `num_steps` steps of Euler's method.

        The prefix is read once; its keys and values serve every step. Arguments as in `forward`.
        """
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        if steps < 1:
            raise InvalidConfigError(f"num_steps={steps} must be at least 1.")
        shape = (len(lang_tokens), self.config.chunk_size, self.config.max_action_dim)
        if noise is None:
            noise = torch.randn(shape, device=lang_tokens.device)
        elif tuple(noise.shape) != shape:
            raise FeatureShapeError("noise", tuple(noise.shape), f"{shape}")

        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        n = real.shape[1]
        mask = block_mask(real, self.config.chunk_size)  # (b, n + 1 + h, n + 1 + h)
        _, cache = self.paligemma_with_expert(
            mask[:, :n, :n],
            real.cumsum(dim=1) - 1,
            inputs_embeds=[prefix, None],
            use_cache=True,
            fill_kv_cache=True,
            prefix_output=False,
        )
        positions = real.sum(dim=1, keepdim=True) + torch.arange(mask.shape[1] - n, device=real.device)  # (b, 1 + h)
        x = noise.float()
        for i in range(steps):
            time = torch.full((len(x),), 1 - i / steps, device=x.device)
            suffix = self.embed_suffix(state, x, time)
            (_, suffix), _ = self.paligemma_with_expert(
                mask[:, n:], positions, past_key_values=cache, inputs_embeds=[None, suffix], use_cache=True
            )
            x = x - self._velocity(suffix) / steps
        return x
