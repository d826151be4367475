"""PI0Policy: a vision-language-action policy that turns noise into actions (Black et al. 2024, arXiv 2410.24164)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from ...configuration.pi0 import PI0PolicyConfig
from ..action_heads.pi0 import PI0FlowMatching
from ..layers.masking import fill_padded, masked_mean
from ..policy import PolicyOutput
from ..registry import register_policy
from .flow import FlowPolicy

BACKBONE = "model.paligemma_with_expert."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Gemma layer
HEADS = ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")


@register_policy("pi0_policy")
class PI0Policy(FlowPolicy):
    """Map pictures, an instruction and the robot's state to a chunk of actions.

    States and actions have the padded widths of the config: the processor pads and takes the padding off again.

    Args:
        config (`PI0PolicyConfig`): with input and output features set.
    """

    config_class = PI0PolicyConfig
    supports_gradient_checkpointing = True
    _supports_flex_attn = True
    _no_split_modules = ["JointLayer", "SiglipEncoderLayer"]
    # As LeRobot trains it in bfloat16. The heads too: noise, time and velocity are float32.
    _keep_in_fp32_modules_strict = [
        "vision_tower",
        "multi_modal_projector",
        "input_layernorm",
        "post_attention_layernorm",
        "language_norm",
        "expert_norm",
        *HEADS,
    ]
    # Small, and what a robot's own states and actions go through: trained in full beside any adapter.
    modules_to_save = tuple(f"model.{name}" for name in HEADS)
    lora_targets = {
        "tune_llm": LINEAR,
        "tune_visual": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "tune_projector": ("linear",),
        "tune_diffusion_model": LINEAR,
    }

    stages = {
        "vision": "model.paligemma_with_expert.embed_image",
        "prefix": "model.read_observation",
        "denoise": "model.denoise_step",
    }

    def __init__(self, config: PI0PolicyConfig):
        config.require_features()
        super().__init__(config)
        self.model = PI0FlowMatching(config)
        backbone = self.model.paligemma_with_expert
        # As transformers' Gemma starts; torch's defaults everywhere else.
        for module in (backbone.embed_tokens, *backbone.layers.modules()):
            module.starts_as_gemma = isinstance(module, (nn.Linear, nn.Embedding))
        self.parameter_parts = _parameter_parts(len(backbone.layers))
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        num_steps: int | None = None,
        return_loss: bool = True,
    ) -> PolicyOutput:
        """Return the training loss for `actions`; without them (or with `return_loss=False`) a sampled chunk.

        Args:
            pixel_values: (b, v, 3, h, w) pictures in [-1, 1].
            pixel_mask: (b, v) bool, False where a camera is absent.
            input_ids: (b, n) tokens of the instruction.
            attention_mask: (b, n), 0 where they are padded.
            state: (b, s) normalised, padded with zeros.
            actions: (b, h, a) normalised labels, padded with zeros.
            action_is_pad: (b, h) bool, True where a step lies beyond the episode.
            action_mask: (b, h, a) bool, False in padded dimensions; by default those beyond the action's width.
            noise: (b, h, a) to mix actions with, or to start sampling from; drawn when None.
            time: (b,) flow times of the mixture; drawn when None.
            num_steps: of sampling; by default the config's `num_inference_steps`.
            return_loss: sample instead when False.

        Returns:
            `PolicyOutput` with `loss` and `losses` (`flow`), or with `actions` (b, h, a), normalised and padded.
        """
        observation = self.check_inputs(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            state=state,
        )
        inputs = (
            observation["pixel_values"],
            observation.get("pixel_mask"),
            observation["input_ids"],
            observation["attention_mask"],
            observation["state"],
        )
        if actions is not None:
            self.check_actions(actions, action_is_pad)
        # 1. Without labels, or where no loss is wanted: sample.
        if actions is None or not return_loss:
            sampled = self.model.sample_actions(*inputs, noise=noise, num_steps=num_steps)
            return PolicyOutput(actions=sampled.to(self.model.action_out_proj.weight.dtype))
        # 2. What counts, by `loss_over`.
        counted = self.config.loss_over
        if counted != "real":
            action_is_pad = None
        elif action_is_pad is not None:
            # Actions of a chunk see each other: what stands in padding must not be chance.
            actions = fill_padded(actions, action_is_pad)
        if action_mask is None:
            action_mask = torch.arange(actions.shape[-1], device=actions.device) < self.config.robot_action_dim
        # 3. The loss.
        error = self.model(*inputs, actions, noise, time)  # (b, h, a)
        loss = masked_mean(error, action_is_pad, None if counted == "all" else action_mask.expand_as(error))
        return PolicyOutput(loss=loss, losses={"flow": loss.detach()})

    def freeze_parts(self) -> None:
        """Freeze what the config says, and what no loss depends on."""
        self.model.freeze()

    def _fuse(self) -> None:
        self.model.paligemma_with_expert.fuse()

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose the attention kernel of the vision tower and of the joint layers: eager, sdpa or flex_attention."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config.attention_implementation = None
        self.model.paligemma_with_expert.config = self.config.backbone_config()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GemmaRMSNorm):
            init.zeros_(module.weight)  # Gemma's norms multiply by 1 + weight
        elif getattr(module, "starts_as_gemma", False):
            init.normal_(module.weight, std=0.02)


def _parameter_parts(depth: int) -> dict[str, tuple[str, ...]]:
    """Return the modules of each part, for so many joint layers; what no loss depends on is in none."""
    layers = [f"{BACKBONE}layers.{i}." for i in range(depth)]
    last = [
        f"{layers[-1]}language_model.{name}" for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")
    ]
    return {
        "tune_llm": (f"{BACKBONE}embed_tokens", *(f"{layer}language_model" for layer in layers[:-1]), *last),
        "tune_visual": (f"{BACKBONE}vision_tower",),
        "tune_projector": (f"{BACKBONE}multi_modal_projector",),
        "tune_diffusion_model": (
            *(f"model.{name}" for name in HEADS),
            *(f"{layer}gemma_expert" for layer in layers),
            f"{BACKBONE}expert_norm",
        ),
    }
