"""GR00TPolicy: what GR00T N1.5 and N1 share (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...configuration.gr00t import GR00TConfig
from ...errors import FeatureShapeError
from ..action_heads.flow_matching import FlowmatchingActionHead
from ..backbones.vision_language import VisionLanguageBackbone
from ..layers.image_tokens import real_pictures
from ..layers.masking import fill_padded, masked_mean
from ..policy import PolicyOutput
from .flow import FlowPolicy

HEAD = "action_head."
# Small, or a robot's own: what its states and actions go through.
PROJECTORS = tuple(HEAD + name for name in ("state_encoder", "action_encoder", "action_decoder", "position_embedding"))


class GR00TPolicy(FlowPolicy):
    """Map pictures, an instruction and the robot's state to a chunk of actions.

    States and actions have the padded widths of the config: the processor pads and takes the padding off again.
    Subclasses name their parts, which are composed here: a backbone that gives features, a head that reads them.
    Beside adapters the projectors are trained in full: those of a new robot start from nothing.

    Args:
        config (`GR00TConfig`): of the same model; features may be absent.
    """

    backbone_class: ClassVar[type[VisionLanguageBackbone]]
    head_class: ClassVar[type[FlowmatchingActionHead]]

    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _no_split_modules = ["SiglipEncoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "TransformerBlock"]
    lora_targets = {
        "tune_llm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "tune_visual": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "mlp1.0", "mlp1.1", "mlp1.3"),
        "tune_diffusion_model": ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"),
    }

    def __init__(self, config: GR00TConfig):
        config.require_features()
        super().__init__(config)
        self.backbone = self.backbone_class(
            **config.backbone_cfg,
            eagle_config=config.eagle_config,
            attention_implementation=config.attention_implementation or config._attn_implementation or "sdpa",
        )
        self.action_head = self.head_class(config.head_config())
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        embodiment_id: torch.Tensor | None = None,
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
            pixel_mask: (b, v) bool, False where a camera is absent; its image tokens are then absent too.
            input_ids: (b, n) the prompt with its image tokens, padded on the left.
            attention_mask: (b, n), 0 where it is padded.
            state: (b, s) normalised, padded with zeros.
            embodiment_id: (b,) int64, the slot of each robot's projectors.
            actions: (b, h, a) normalised labels, padded with zeros.
            action_is_pad: (b, h) bool, True where a step lies beyond the episode.
            action_mask: (b, h, a) bool, False in padded dimensions; by default those beyond the action's width.
            noise: (b, h, a) to mix actions with, or to start sampling from; drawn when None.
            time: (b,) flow times of the mixture, 0 is noise; drawn when None.
            num_steps: of sampling; by default the config's `num_inference_timesteps`.
            return_loss: sample instead when False.

        Returns:
            `PolicyOutput` with `loss` and `losses` (`flow`), or with `actions` (b, h, a), normalised and padded.
        """
        inputs = self.check_inputs(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            state=state,
            embodiment_id=embodiment_id,
        )
        if actions is not None:
            self.check_actions(actions, action_is_pad)
        # 1. The features of pictures and words.
        pictures = real_pictures(inputs["pixel_values"], inputs.get("pixel_mask"))  # (m, 3, h, w)
        mask = inputs["attention_mask"]
        features = self.backbone.encode(pictures, inputs["input_ids"], mask)  # (b, n, c)
        state, embodiment_id = inputs["state"], inputs["embodiment_id"]
        # 2. Without labels, or where no loss is wanted: sample.
        if actions is None or not return_loss:
            sampled = self.action_head.sample(features, mask, state, embodiment_id, noise, num_steps=num_steps)
            return PolicyOutput(actions=sampled.to(self.dtype))
        # 3. What counts, by `loss_over`.
        if self.config.loss_over == "steps":
            action_is_pad = None
        elif action_is_pad is not None:
            # Actions of a chunk see each other: what stands in padding must not be chance.
            actions = fill_padded(actions, action_is_pad)
        counted = self._real_dimensions(actions) if action_mask is None else action_mask.bool()
        if action_is_pad is not None:
            counted = counted & ~action_is_pad[:, :, None]
        # 4. The loss.
        flow = self.action_head.loss(features, mask, state, actions, counted, embodiment_id, noise, time)
        loss = masked_mean(flow.error, action_mask=flow.action_mask)
        return PolicyOutput(loss=loss, losses={"flow": loss.detach()})

    def freeze_parts(self) -> None:
        """Freeze what the config says."""
        self.backbone.freeze()
        self.action_head.freeze()

    def check_inputs(self, **observation: Any) -> dict[str, Any]:
        """Return the observation inputs; see `PolicyModel.check_inputs`. The state may be (b, 1, s), as published."""
        inputs = super().check_inputs(**observation)
        pictures = inputs["pixel_values"]
        if isinstance(pictures, (list, tuple)):  # one (b, 3, h, w) per camera
            pictures = torch.stack(list(pictures), dim=1)
        if pictures.ndim != 5:
            raise FeatureShapeError("pixel_values", tuple(pictures.shape), "(batch, cameras, 3, height, width)")
        return inputs | {"pixel_values": pictures}

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose the attention kernel of the vision tower and of the language model."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config.attention_implementation = None

    def _real_dimensions(self, actions: torch.Tensor) -> torch.Tensor:
        """Return which dimensions of actions (b, h, a) are not padding, of the same shape."""
        width = self.config.robot_action_dim if self.config.output_features else actions.shape[-1]
        return (torch.arange(actions.shape[-1], device=actions.device) < width).expand_as(actions)


def sampling_stages(model: str) -> dict[str, str]:
    """Return what sampling consists of; `model` is the name of the vision-language model."""
    return {
        "vision": f"{model}.embed_pictures",
        "language": f"{model}.read_prompt",
        "prepare": f"{HEAD}prepare",
        "denoise": f"{HEAD}step",
    }


def parts_of(model: str, projectors: tuple[str, ...], transformers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the modules of each part; projectors are trained in full beside any adapter.

    Args:
        model: name of the vision-language model.
        projectors: names of what a robot's states and actions, and the features, go through.
        transformers: names of what turns noise into actions.
    """
    return {
        "tune_llm": (f"{model}.language_model",),
        "tune_visual": (f"{model}.vision_model", f"{model}.mlp1"),
        "tune_projector": projectors,
        "tune_diffusion_model": transformers,
    }
