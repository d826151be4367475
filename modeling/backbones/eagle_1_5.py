"""EagleBackbone1_5: Eagle 2.5, SigLIP 2 and Qwen3, as the eyes and the understanding of GR00T N1.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ...configuration.eagle import EagleConfig1_5
from ...errors import InvalidConfigError
from .eagle_base import EagleBackboneBase, EagleModel, eagle_parts, eagle_stages


class EagleBackbone1_5(EagleBackboneBase):
    """Encode pictures and an instruction as features for `FlowmatchingActionHead_1_5`.

    Its inputs' names begin with `eagle_`. Padding is on the left. Source: NVIDIA 2025 (arXiv 2503.14734) and
    Isaac-GR00T, whose parameter names are kept.

    Args:
        select_layer (`int`, *optional*, defaults to 12): how many of the language model's layers are kept.
        tune_llm (`bool`, *optional*, defaults to False): train the language model.
        tune_visual (`bool`, *optional*, defaults to False): train the vision tower and the connector.
        reproject_vision (`bool`, *optional*): only False exists in N1.5.
        use_flash_attention, load_bf16, eagle_path: published, without effect: `attention_implementation` says the
            kernel, the weights their type, `eagle_config` the sizes.
        project_to_dim (`int`, *optional*, defaults to 1536): width of the features; None leaves the language model's,
            as the published N1.5 does.
        eagle_config (`dict` or `PreTrainedConfig`, *optional*): fields in which it differs from the published Eagle
            2.5; see `EagleConfig1_5`.
        attention_implementation (`str`, *optional*, defaults to `"sdpa"`): or `"flash_attention_2"`; with `"eager"`
            the features of padding differ from the published model's.

    Raises:
        InvalidConfigError: sizes that do not fit each other, or a layer that does not exist.
        UnknownConfigFieldError: a field of `eagle_config` that does not exist.
    """

    prefix = "eagle_"
    parameter_parts = eagle_parts("eagle_model", "eagle_linear")
    modules_to_save = ("eagle_linear",)
    quantizable = ("eagle_model.language_model", "eagle_model.vision_model")
    stages = eagle_stages("eagle_model")

    def __init__(
        self,
        select_layer: int = 12,
        tune_llm: bool = False,
        tune_visual: bool = False,
        reproject_vision: bool = False,
        use_flash_attention: bool = False,
        load_bf16: bool = False,
        eagle_path: str | None = None,
        project_to_dim: int | None = 1536,
        eagle_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        attention_implementation: str = "sdpa",
    ):
        super().__init__()
        if reproject_vision:
            raise InvalidConfigError("reproject_vision=True exists in GR00T N1 only: EagleBackbone, not 1_5.")
        self.config = EagleConfig1_5.of(eagle_config)
        self.select_layer, self.tune_llm, self.tune_visual = select_layer, tune_llm, tune_visual
        self.eagle_model = EagleModel(self.config, select_layer, attention_implementation)
        width = self.config.language_config.hidden_size
        self.eagle_linear = nn.Identity() if project_to_dim is None else nn.Linear(width, project_to_dim)
        self.freeze()
        self.train()

    @property
    def vision_language_model(self) -> EagleModel:
        """Eagle 2.5: `eagle_model`."""
        return self.eagle_model

    @property
    def projection(self) -> nn.Module:
        """`eagle_linear`."""
        return self.eagle_linear

    @property
    def image_token_id(self) -> int:
        """The token in whose place a picture's token stands: the config's `image_token_index`."""
        return self.config.image_token_index
