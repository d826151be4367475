"""Configuration of π0.5: π0 with the state in the prompt and the flow time in its norms (arXiv 2504.16054)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .pi0 import PaliGemmaWithExpertConfig, PI0PolicyConfig


class PI05PolicyConfig(PI0PolicyConfig):
    """Configure π0.5. Defaults are those of openpi and LeRobot; arguments as of `PI0PolicyConfig`, except:

    Args:
        max_instruction_tokens (`int`, *optional*, defaults to 200): tokens per prompt, in which the state is written.
    """

    model_type = "pi05_policy"
    default_normalization: ClassVar[Mapping[str, str]] = PI0PolicyConfig.default_normalization | {
        "STATE": "QUANTILES",
        "ACTION": "QUANTILES",
    }

    state_in_prompt: ClassVar[bool] = True

    max_instruction_tokens: int = 200

    def backbone_config(self) -> PaliGemmaWithExpertConfig:
        """Return the config of `PaliGemmaWithExpertModel`, whose expert's norms are adaptive."""
        config = super().backbone_config()
        config.adaptive_norms = True
        return config
