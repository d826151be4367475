"""PI0FlowMatching: π0's network, which turns noise into actions by following a learned velocity.

Shapes: b batch, v cameras, n tokens of the prefix (pictures, then words), u of the state (one, in π0.5 none), h action
horizon, s and a the padded widths of state and action, d PaliGemma's width, w the expert's. Time runs from 1, noise,
to 0, actions. Source: Black et al. 2024 (arXiv 2410.24164) and openpi, whose parameter names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ...configuration.pi0 import PI0PolicyConfig
from ...errors import FeatureShapeError
from ..backbones.paligemma_with_expert import KeysValues, PaliGemmaWithExpertModel, Rotary
from ..precision import compute_dtype
from ..samplers import FlowSampler, draw_noise
from ..seam import checked_draw

BACKBONE = "paligemma_with_expert."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Gemma layer
HEADS = ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")


def block_mask(prefix_mask: torch.Tensor, horizon: int, states: int = 1) -> torch.Tensor:
    """Return who sees whom (b, n + u + h, n + u + h), for the prefix's real tokens (b, n) bool and u of the state.

    Inside a block all see each other; a block sees those before it. Padding is seen by none; what it sees itself
    does not matter, so it sees what its block does, and no row is empty.

                   prefix   state   actions
        prefix       ✓
        state        ✓        ✓
        actions      ✓        ✓        ✓
    """
    b, n = prefix_mask.shape
    position = torch.arange(n + states + horizon, device=prefix_mask.device)
    block = (position >= n).int() + (position >= n + states)  # (n + u + h,): 0, then 1 for the state, then 2
    real = torch.cat([prefix_mask, prefix_mask.new_ones(b, states + horizon)], dim=1)  # (b, n + u + h)
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

    lora_targets = {
        "tune_llm": LINEAR,
        "tune_visual": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "tune_projector": ("linear",),
        "tune_diffusion_model": LINEAR,
    }
    heads = modules_to_save = HEADS  # small, and what a robot's own states and actions go through
    stages = {"vision": BACKBONE + "embed_image", "prefix": "encode_observation", "denoise": "denoise_step"}
    no_split_modules = ("JointLayer", "SiglipEncoderLayer")
    expert_norms = "expert_norm"  # module of the backbone that holds weights of the expert's norms outside its layers
    state_tokens = 1  # of the suffix, before the actions

    def __init__(self, config: PI0PolicyConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.sampler = FlowSampler(  # time runs from 1, noise, to 0, actions
            1,
            config.time_sampling_beta_alpha,
            config.time_sampling_beta_beta,
            start=config.time_sampling_offset,
            slope=config.time_sampling_scale,
        )
        backbone = config.backbone_config()
        self.build_heads(backbone.gemma_expert_config.hidden_size)
        self.paligemma_with_expert = PaliGemmaWithExpertModel(backbone)
        self.freeze()

    def build_heads(self, w: int) -> None:
        """Build the layers around an expert of this width, w."""
        self.state_proj = nn.Linear(self.config.max_state_dim, w)
        self.action_in_proj = nn.Linear(self.config.max_action_dim, w)
        self.action_time_mlp_in = nn.Linear(2 * w, w)
        self.action_time_mlp_out = nn.Linear(w, w)
        self.action_out_proj = nn.Linear(w, self.config.max_action_dim)

    @property
    def input_embeddings(self) -> nn.Module:
        """The embedding of PaliGemma's tokens."""
        return self.paligemma_with_expert.embed_tokens

    @property
    def quantizable(self) -> tuple[str, ...]:
        """PaliGemma's own layers; the action expert's are none of them."""
        layers = range(len(self.paligemma_with_expert.layers))
        return (BACKBONE + "vision_tower", *(f"{BACKBONE}layers.{i}.language_model" for i in layers))

    @property
    def parameter_parts(self) -> dict[str, tuple[str, ...]]:
        """Modules of each part; what no loss depends on is in none."""
        layers = [f"{BACKBONE}layers.{i}." for i in range(len(self.paligemma_with_expert.layers))]
        last = [
            layers[-1] + "language_model." + x for x in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")
        ]
        return {
            "tune_llm": (BACKBONE + "embed_tokens", *(layer + "language_model" for layer in layers[:-1]), *last),
            "tune_visual": (BACKBONE + "vision_tower",),
            "tune_projector": (BACKBONE + "multi_modal_projector",),
            "tune_diffusion_model": (*self.heads, *(x + "gemma_expert" for x in layers), BACKBONE + self.expert_norms),
        }

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
        return self.join_suffix(state, noisy_actions, self.embed_time(time)[:, None])

    def join_suffix(self, state: torch.Tensor, noisy_actions: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the suffix of `embed_suffix` for an encoded flow time (b, 1, w)."""
        return torch.cat([self.embed_state(state), self.embed_actions(noisy_actions, time)], dim=1)

    def embed_state(self, state: torch.Tensor) -> torch.Tensor:
        """Return the token (b, 1, w) of a state (b, s), or of the last of a history (b, t, s)."""
        require_width("state", state, self.config.max_state_dim)
        state = state[:, -1:] if state.ndim == 3 else state[:, None]  # (b, 1, s)
        return self.state_proj(state.to(compute_dtype(self.state_proj)))

    def embed_time(self, time: torch.Tensor) -> torch.Tensor:
        """Return the encoding (n, w) of flow times (n,) that actions are mixed with."""
        projection = self.action_in_proj
        encoded = encode_time(time, projection.out_features, self.config.min_period, self.config.max_period)
        return encoded.to(compute_dtype(projection))

    def embed_actions(self, noisy_actions: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the tokens (b, h, w) of actions (b, h, a) at an encoded flow time (b or 1, 1, w)."""
        require_width("actions", noisy_actions, self.config.max_action_dim)
        actions = self.action_in_proj(noisy_actions.to(compute_dtype(self.action_in_proj)))  # (b, h, w)
        mixed = F.silu(self.action_time_mlp_in(torch.cat([actions, time.expand_as(actions)], dim=-1)))
        return self.action_time_mlp_out(mixed)

    def modulation(self, time: torch.Tensor) -> torch.Tensor | None:
        """Return what an encoded flow time does to the expert's norms: here nothing, None."""
        return None

    def _velocity(self, actions: torch.Tensor) -> torch.Tensor:
        """Return the velocity (b, h, a) that the expert's output for the actions (b, h, w) stands for."""
        return self.action_out_proj(actions.to(compute_dtype(self.action_out_proj))).float()

    # --- training ---------------------------------------------------------------------------------------

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
        b, sampler = len(actions), self.sampler
        noise = torch.randn_like(actions) if noise is None else checked_draw("noise", noise, actions.shape).float()
        time = sampler.draw_time(b, actions.device) if time is None else sampler.given_time(time, b)
        noisy, velocity = self.sampler.mix(actions, noise, time)  # (b, h, a)

        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        encoded = self.embed_time(time)[:, None]  # (b, 1, w)
        suffix = self.join_suffix(state, noisy, encoded)
        real_suffix = real.new_ones(suffix.shape[:2])  # (b, u + h)
        positions = torch.cat([real, real_suffix], dim=1).cumsum(dim=1) - 1  # (b, n + u + h): padding takes none
        (_, suffix), _ = self.paligemma_with_expert(
            block_mask(real, actions.shape[1], self.state_tokens),
            positions,
            inputs_embeds=[prefix, suffix],
            prefix_output=False,
            modulation=self.modulation(encoded),
        )
        return F.mse_loss(self._velocity(suffix[:, self.state_tokens :]), velocity, reduction="none")

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
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return actions (b, h, a): the velocity followed from noise, in `num_steps` steps of Euler's method.

        Prefix and state are read once; their keys and values serve every step. Arguments as in `forward`; where there
        is no noise, `generator` draws it.
        """
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        times = self.sampler.times(steps)
        shape = (len(lang_tokens), self.config.chunk_size, self.config.max_action_dim)
        noise = draw_noise(shape, noise, generator, lang_tokens.device)

        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        cache = self.encode_observation(prefix, real, state)
        # What all steps share, or have each their row of.
        rotary, bias = self.action_tables(real)
        encoded = self.embed_time(torch.tensor(times, device=real.device))  # (steps, w)

        def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
            return self.denoise_step(x, encoded[i], cache, rotary, bias)

        return self.sampler.integrate(noise, velocity, steps)

    def encode_observation(self, prefix: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> list[KeysValues]:
        """Return the keys and values (b, k, n + u + h, e) of prefix (b, n, d) and state, then room for the actions'.

        Neither sees actions, so that their keys and values are the same at every step.
        """
        n, u = real.shape[1], self.state_tokens
        cache = self.paligemma_with_expert.new_cache(prefix, n + u + self.config.chunk_size)
        rotary = self.paligemma_with_expert.rotary(F.pad(real, (0, u), value=True).cumsum(dim=1) - 1)
        bias = self.paligemma_with_expert.attention_bias(block_mask(real, 0, u))  # (b, 1, n + u, n + u)
        streams = (prefix, self.embed_state(state))
        self.paligemma_with_expert.run_layers(streams, bias, rotary, cache, wanted=(False, False))
        return cache

    def action_tables(self, real: torch.Tensor) -> tuple[Rotary, torch.Tensor]:
        """Return rotary tables and attention bias (b, 1, 1, n + u + h) of the actions behind a prefix (b, n)."""
        h, u = self.config.chunk_size, self.state_tokens
        positions = real.sum(dim=1, keepdim=True) + u + torch.arange(h, device=real.device)  # (b, h)
        seen = F.pad(real, (0, u + h), value=True)[:, None]  # (b, 1, n + u + h): every action sees all that is real
        return self.paligemma_with_expert.rotary(positions), self.paligemma_with_expert.attention_bias(seen)

    def denoise_step(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        cache: Sequence[KeysValues],
        rotary: Rotary,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Return the velocity (b, h, a) of noisy actions, float32.

        Args:
            x: (b, h, a), float32.
            time: (w,) the encoded flow time of x.
            cache: of `encode_observation`; its end is written to.
            rotary, bias: of `action_tables`.
        """
        tokens = self.embed_actions(x, time)  # (b, h, w)
        start = cache[0][0].shape[-2] - x.shape[1]
        (_, tokens), _ = self.paligemma_with_expert.run_layers(
            (None, tokens), bias, rotary, cache, start, modulation=self.modulation(time)
        )
        return self._velocity(tokens)


def require_width(name: str, x: torch.Tensor, width: int) -> None:
    """Check that states or actions (…, width) have their padded width.

    Raises:
        FeatureShapeError: they have another.
    """
    if x.shape[-1] != width:
        raise FeatureShapeError(name, tuple(x.shape), f"a last dimension of {width}, padded with zeros")
