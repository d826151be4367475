"""EagleBackbone: Eagle 2, SigLIP 2 and a Llama-type language model, as the eyes and the understanding of GR00T N1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..._tokenizers import load_tokenizer
from ...configuration.eagle import EagleConfig
from ...errors import InvalidConfigError, MissingTokenizerError
from .eagle_base import EagleBackboneBase, EagleModel, eagle_parts, eagle_stages

IMAGE_TOKEN = "<IMG_CONTEXT>"
PUBLISHED_IMAGE_TOKEN_ID = 49154  # of `IMAGE_TOKEN` in the tokenizer that N1 was published with


class EagleBackbone(EagleBackboneBase):
    """Encode pictures and an instruction as features for `FlowmatchingActionHead`.

    Padding is on the left. Source: NVIDIA 2025 (arXiv 2503.14734) and Isaac-GR00T, whose parameter names are kept.

    Args:
        select_layer (`int`, *optional*, defaults to 12): how many of the language model's layers are kept.
        tune_llm (`bool`, *optional*, defaults to False): train the language model.
        tune_visual (`bool`, *optional*, defaults to False): train the vision tower and the connector.
        reproject_vision (`bool`, *optional*, defaults to False): put the pictures' tokens over the features that the
            language model made of them.
        scale_image_resolution (`int`, *optional*, defaults to 1): how many times as high and wide the pictures are as
            the tower's own; its position embeddings are interpolated.
        processor_cfg (`dict`, *optional*): of the image and chat processor; here `model_path`, a folder or Hub id,
            names the tokenizer that knows the image token's id.
        projector_dim (`int`, *optional*, defaults to -1): the language model's width, where features are projected to
            `project_to_dim`; -1 leaves them.
        project_to_dim (`int`, *optional*, defaults to 1536): width of projected features.
        eagle_config (`dict` or `PreTrainedConfig`, *optional*): fields in which it differs from the published Eagle 2;
            see `EagleConfig`.
        img_context_token_id (`int`, *optional*): the image token's id; by default from the tokenizer that
            `processor_cfg` names, looked up when it is first needed, else the published one.
        attention_implementation (`str`, *optional*, defaults to `"sdpa"`): or `"flash_attention_2"`; with `"eager"`
            the features of padding differ from the published model's.
        model_name, allow_reshape_visual, remove_llm, load_pretrained_det_eagle_path, eagle_path, use_flash_attention,
            load_bf16, use_local_eagle_hg_model: published, without effect.

    Raises:
        InvalidConfigError: sizes that do not fit each other, or a layer that does not exist.
        UnknownConfigFieldError: a field of `eagle_config` that does not exist.
    """

    parameter_parts = eagle_parts("model", "linear")
    modules_to_save = ("linear",)
    quantizable = ("model.language_model", "model.vision_model")
    stages = eagle_stages("model")

    def __init__(
        self,
        select_layer: int = 12,
        model_name: str | None = None,
        tune_llm: bool = False,
        tune_visual: bool = False,
        reproject_vision: bool = False,
        scale_image_resolution: int = 1,
        processor_cfg: Mapping[str, Any] | None = None,
        projector_dim: int = -1,
        allow_reshape_visual: bool = True,
        remove_llm: bool = False,
        load_pretrained_det_eagle_path: str | None = None,
        eagle_path: str | None = None,
        use_flash_attention: bool = False,
        load_bf16: bool = False,
        project_to_dim: int | None = 1536,
        use_local_eagle_hg_model: bool = True,
        eagle_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        img_context_token_id: int | None = None,
        attention_implementation: str = "sdpa",
    ):
        super().__init__()
        self.config = EagleConfig.of(eagle_config)
        width = self.config.language_config.hidden_size
        if projector_dim not in (-1, width):
            raise InvalidConfigError(
                f"projector_dim={projector_dim}, but the language model's width is {width}. Pass "
                f"projector_dim={width} to project its features to project_to_dim={project_to_dim}, or -1 not to."
            )
        if not (isinstance(scale_image_resolution, int) and scale_image_resolution >= 1):
            raise InvalidConfigError(f"scale_image_resolution={scale_image_resolution} must be a whole number from 1.")
        self.select_layer, self.tune_llm, self.tune_visual = select_layer, tune_llm, tune_visual
        self.reproject_vision = reproject_vision
        self.processor_cfg = dict(processor_cfg or {})
        self._img_context_token_id = img_context_token_id
        self.model = EagleModel(self.config, select_layer, attention_implementation, scale_image_resolution)
        projects = projector_dim != -1 and project_to_dim is not None
        self.linear = nn.Linear(width, project_to_dim) if projects else nn.Identity()
        self.freeze()
        self.train()

    @property
    def vision_language_model(self) -> EagleModel:
        """Eagle 2: `model`."""
        return self.model

    @property
    def projection(self) -> nn.Module:
        """`linear`."""
        return self.linear

    @property
    def image_token_id(self) -> int:
        """The token in whose place a picture's token stands: `img_context_token_id`."""
        return self.img_context_token_id

    @property
    def img_context_token_id(self) -> int:
        """The id of `<IMG_CONTEXT>`.

        Raises:
            InvalidConfigError: the tokenizer that `processor_cfg` names cannot be loaded, or has no such token.
        """
        if self._img_context_token_id is None:
            self._img_context_token_id = self._look_up_image_token()
        return self._img_context_token_id

    def _look_up_image_token(self) -> int:
        path = self.processor_cfg.get("model_path")
        if path is None:
            return PUBLISHED_IMAGE_TOKEN_ID
        try:
            known = load_tokenizer(path).get_vocab()
        except MissingTokenizerError as error:
            raise InvalidConfigError(
                f"processor_cfg names {str(path)!r}, where no tokenizer can be loaded. Name a folder or Hub id that "
                f"holds one, or pass img_context_token_id={PUBLISHED_IMAGE_TOKEN_ID}, which the published one has."
            ) from error
        if IMAGE_TOKEN not in known:
            raise InvalidConfigError(
                f"The tokenizer in {str(path)!r} does not know {IMAGE_TOKEN}. Pass img_context_token_id of the token "
                f"that stands for pictures."
            )
        return known[IMAGE_TOKEN]
