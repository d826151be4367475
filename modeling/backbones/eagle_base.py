"""EagleModel and EagleBackboneBase: what the backbones of GR00T N1 and N1.5 share.

Shapes: b batch, m pictures of the whole batch, k tokens per picture, n tokens of a prompt, c width of the vision
tower, d width of the language model, or of the features where they are projected. Vision tower and language model are
transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, BatchFeature, PreTrainedConfig

from ...configuration.eagle import EagleBaseConfig
from ...configuration.gr00t import GR00TConfig
from ...errors import FeatureShapeError, InvalidConfigError, MissingFeatureError
from ..freezing import PartlyFrozen
from ..kernels import require_kernel
from ..layers.image_tokens import pixel_shuffle, place_pictures, real_pictures
from ..seam import Features, PolicyInputs


class EagleModel(nn.Module):
    """Read a prompt in which pictures stand in place of image tokens, with a language model's first layers.

    There is no vision pooling and no head over words: nothing here reads or says them.

    Args:
        config (`EagleBaseConfig`): of tower, connector and language model.
        layers (`int`): how many of the language model's layers are kept; its last norm always is.
        attention_implementation (`str`): transformers' name of a kernel. Rows that see nothing, which are padding on
            the left, get an attention output of 0 from `"sdpa"` and `"flash_attention_2"`, as in NVIDIA's training;
            `"eager"` gives them the mean of all values.
        scale (`int`, *optional*, defaults to 1): how many times as large the pictures are as the tower's own; its
            position embeddings are interpolated.

    Raises:
        InvalidConfigError: the language model has not so many layers, or the kernel is not known.
    """

    def __init__(self, config: EagleBaseConfig, layers: int, attention_implementation: str, scale: int = 1):
        super().__init__()
        vision, text = copy.deepcopy(config.vision_config), config.truncated_language_config(layers)
        self.picture_size, self.tokens_per_picture = vision.image_size * scale, config.image_tokens(scale)
        self.interpolates = scale != 1
        self.stacked_patches = config.stacked_patches
        self.vision_model = _native(vision, attention_implementation)
        self.language_model = _native(text, attention_implementation)
        c, d = vision.hidden_size * self.stacked_patches**2, text.hidden_size
        if config.mlp_connector_layers == 1:
            self.mlp1 = nn.Sequential(nn.Linear(c, d))
        else:
            self.mlp1 = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, d), nn.GELU(), nn.Linear(d, d))

    def _apply(self, fn, recurse: bool = True) -> EagleModel:
        """Move or cast; then fill again what no checkpoint holds.

        Casting would round the rotary frequencies, by up to half a radian at the 300th token; a module that
        was built on the meta device has none.
        """
        super()._apply(fn, recurse)
        rotary = self.language_model.rotary_emb
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rotary, name, getattr(rotary, name).float())
        self.language_model._init_weights(rotary)
        positions = self.vision_model.embeddings.position_ids  # (1, patches)
        positions.copy_(torch.arange(positions.shape[-1], device=positions.device))
        return self

    def embed_pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tokens (m, k, d) of pictures (m, 3, h, w) in [-1, 1].

        Raises:
            FeatureShapeError: pictures of another size than the tower's.
        """
        require_kernel(self.vision_model.config._attn_implementation, pixel_values.device)
        size = (3, self.picture_size, self.picture_size)
        if tuple(pixel_values.shape[1:]) != size:
            raise FeatureShapeError(
                "pixel_values", tuple(pixel_values.shape), f"(pictures, {', '.join(map(str, size))})"
            )
        if not len(pixel_values):  # which the tower's attention cannot reshape
            width = self.language_model.config.hidden_size
            return pixel_values.new_zeros(0, self.tokens_per_picture, width)
        patches = self.vision_model(pixel_values, interpolate_pos_encoding=self.interpolates)[0]
        if self.stacked_patches > 1:
            patches = pixel_shuffle(patches, self.stacked_patches)  # (m, k, stack · stack · c)
        return self.mlp1(patches)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_token_id: int,
        reproject: bool = False,
    ) -> torch.Tensor:
        """Return the language model's features (b, n, d) of prompts with pictures.

        Args:
            pixel_values: (m, 3, h, w), in the order of their tokens.
            input_ids: (b, n), image tokens included.
            attention_mask: (b, n), 0 where a prompt is padded.
            image_token_id: which of the ids are image tokens.
            reproject: put the pictures' tokens over the features that they led to.

        Raises:
            ImageTokenError: there are not as many image tokens as the pictures become.
            FeatureShapeError: inputs that do not belong together.
        """
        if attention_mask.shape != input_ids.shape:
            raise FeatureShapeError("attention_mask", tuple(attention_mask.shape), f"{tuple(input_ids.shape)}")
        pictures = self.embed_pictures(pixel_values)  # (m, k, d)
        return self.encode_prompt(pictures, input_ids, attention_mask, image_token_id, reproject)

    def encode_prompt(
        self,
        pictures: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_token_id: int,
        reproject: bool = False,
    ) -> torch.Tensor:
        """Return the features (b, n, d) of prompts in which the tokens (m, k, d) of pictures stand; see `forward`."""
        require_kernel(self.language_model.config._attn_implementation, input_ids.device)
        # 1. Pictures and words, in one sequence.
        words = self.language_model.embed_tokens(input_ids)  # (b, n, d)
        prompt = place_pictures(words, pictures, input_ids, image_token_id)
        # 2. The layers that were kept, and the norm. Positions count padding, as in training.
        features = self.language_model(inputs_embeds=prompt, attention_mask=attention_mask, use_cache=False)
        features = features.last_hidden_state  # (b, n, d)
        return place_pictures(features, pictures, input_ids, image_token_id) if reproject else features


class EagleBackboneBase(PartlyFrozen):
    """Encode prompts with pictures as features: what the backbones of GR00T N1 and N1.5 share.

    Subclasses build an `EagleModel` and a projection of its features, under their published names.
    """

    lora_targets = {
        "tune_llm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "tune_visual": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "mlp1.0", "mlp1.1", "mlp1.3"),
    }
    no_split_modules = ("SiglipEncoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer")

    prefix: ClassVar[str] = ""  # of the names of its inputs
    reads_state = False

    tune_llm: bool
    tune_visual: bool
    reproject_vision: bool = False
    image_token_id: int

    @classmethod
    def from_config(cls, config: GR00TConfig) -> EagleBackboneBase:
        """Build the backbone that the config of a GR00T describes."""
        kernel = config.attention_implementation or config._attn_implementation or "sdpa"
        return cls(**config.backbone_cfg, eagle_config=config.eagle_config, attention_implementation=kernel)

    @property
    def vision_language_model(self) -> EagleModel:
        """The model, under whichever name it is published."""
        raise NotImplementedError

    @property
    def projection(self) -> nn.Module:
        """What its features are projected with, under whichever name it is published."""
        raise NotImplementedError

    @property
    def input_embeddings(self) -> nn.Module:
        """The embedding of the language model's tokens."""
        return self.vision_language_model.language_model.embed_tokens

    @property
    def width(self) -> int:
        """Width of the features."""
        if isinstance(self.projection, nn.Identity):
            return self.vision_language_model.language_model.config.hidden_size
        return self.projection.out_features

    # --- training -----------------------------------------------------------------------------------------

    def frozen_modules(self) -> list[nn.Module]:
        """Return what `tune_llm` and `tune_visual` say is not trained; the projection always is."""
        model = self.vision_language_model
        language = [] if self.tune_llm else [model.language_model]
        return language + ([] if self.tune_visual else [model.vision_model, model.mlp1])

    # --- features -----------------------------------------------------------------------------------------

    def encode(self, inputs: PolicyInputs) -> Features:
        """Return the features of an observation: `pixel_values`, `input_ids` and `attention_mask`."""
        pictures = inputs.pixel_values
        if isinstance(pictures, (list, tuple)):  # one (b, 3, h, w) per camera
            pictures = torch.stack(list(pictures), dim=1)
        if pictures.ndim != 5:
            raise FeatureShapeError("pixel_values", tuple(pictures.shape), "(batch, cameras, 3, height, width)")
        pictures = real_pictures(pictures, inputs.pixel_mask)
        return Features(self.encode_prompts(pictures, inputs.input_ids, inputs.attention_mask), inputs.attention_mask)

    def encode_prompts(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return features (b, n, d) of pictures (m, 3, h, w) and prompts (b, n); see `EagleModel`."""
        features = self.vision_language_model(
            pixel_values, input_ids, attention_mask, self.image_token_id, self.reproject_vision
        )
        return self.projection(features)

    def prepare_input(self, batch: Mapping[str, Any]) -> BatchFeature:
        """Return what the backbone reads of a batch, under its own names; others and `image_sizes` are left out.

        Raises:
            MissingFeatureError: an input is absent.
        """
        wanted = {name: self.prefix + name for name in ("pixel_values", "input_ids", "attention_mask")}
        found = {full: batch[full] if full in batch else batch.get(name) for name, full in wanted.items()}
        missing = [full for full, value in found.items() if value is None]
        if missing:
            raise MissingFeatureError(missing, batch, found, "vl_input")
        if batch.get("pixel_mask") is not None:
            found["pixel_mask"] = batch["pixel_mask"]
        return BatchFeature(data=found)

    def forward(self, vl_input: Mapping[str, Any]) -> BatchFeature:
        """Return `backbone_features` (b, n, d) and `backbone_attention_mask` (b, n).

        Args:
            vl_input: `pixel_values` (m, 3, h, w), or (b, v, 3, h, w) with a `pixel_mask` (b, v) of which are real;
                `input_ids` and `attention_mask` (b, n). Names may carry the backbone's prefix.

        Raises:
            MissingFeatureError, FeatureShapeError, ImageTokenError: inputs that are absent or do not fit.
        """
        inputs = self.prepare_input(vl_input)
        pixel_values, input_ids, attention_mask = (
            inputs[self.prefix + name] for name in ("pixel_values", "input_ids", "attention_mask")
        )
        pictures = real_pictures(pixel_values, inputs.get("pixel_mask"))
        features = self.encode_prompts(pictures, input_ids, attention_mask)
        return BatchFeature(data={"backbone_features": features, "backbone_attention_mask": attention_mask})


def _native(config: PreTrainedConfig, attention_implementation: str) -> nn.Module:
    """Return transformers' model of a config, with the kernel that is asked for."""
    try:
        return AutoModel.from_config(config, attn_implementation=attention_implementation)
    except ValueError as error:
        raise InvalidConfigError(f"attention_implementation={attention_implementation!r}: {error}") from error


def eagle_parts(model: str, projection: str) -> dict[str, tuple[str, ...]]:
    """Return the modules of each part of a backbone, by the published names of its model and projection."""
    return {
        "tune_llm": (f"{model}.language_model",),
        "tune_visual": (f"{model}.vision_model", f"{model}.mlp1"),
        "tune_projector": (projection,),
    }


def eagle_stages(model: str) -> dict[str, str]:
    """Return what encoding an observation consists of, by the published name of the model."""
    return {"vision": f"{model}.embed_pictures", "language": f"{model}.encode_prompt"}
