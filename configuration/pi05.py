"""Configuration of π0.5: π0 with the state in the prompt and the flow time in its norms (arXiv 2504.16054)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..errors import InvalidConfigError
from .pi0 import PaliGemmaWithExpertConfig, PI0PolicyConfig


class PI05PolicyConfig(PI0PolicyConfig):
    """Configure π0.5. Defaults are those of openpi and LeRobot; arguments as of `PI0PolicyConfig`, except:

    Args:
        max_instruction_tokens (`int`, *optional*, defaults to 200): tokens per prompt, in which the state is written.
        prompt_state_dim (`int`, *optional*): numbers of the state that the prompt tells, zeros of padding included; by
            default those that the robot has. Files of other projects do not say it: LeRobot of early 2026 trained with
            32, openpi's `pi05_libero` with 0, a prompt without state.
        max_state_dim (`int`, *optional*, defaults to 32): width of the input `state`, which is padded; wider states
            are not, because the network reads them in the prompt only.
    """

    model_type = "pi05_policy"
    default_normalization: ClassVar[Mapping[str, str]] = PI0PolicyConfig.default_normalization | {
        "STATE": "QUANTILES",
        "ACTION": "QUANTILES",
    }

    state_in_prompt: ClassVar[bool] = True

    max_instruction_tokens: int = 200
    prompt_state_dim: int | None = None

    @property
    def model_state_dim(self) -> int:
        """Width of the input `state`: `max_state_dim`, or the robot's where it is wider; 0 of a robot without one."""
        return 0 if self.state_dim is None else max(self.max_state_dim, self.state_dim)

    @property
    def needs_state(self) -> bool:
        """Whether the prompt tells the state."""
        return self.prompt_state_dim != 0

    def validate_prompt(self) -> None:
        """Check that the prompt has room for the numbers that the robot's state has, or for none."""
        width = self.state_dim or 0
        if self.prompt_state_dim not in (None, 0) and self.prompt_state_dim < max(width, 1):
            raise InvalidConfigError(
                f"prompt_state_dim={self.prompt_state_dim}, but the state has {width} numbers, which the prompt tells "
                f"all. Leave it out, or say at least {width}; 0 is a prompt without state."
            )

    def backbone_config(self) -> PaliGemmaWithExpertConfig:
        """Return the config of `PaliGemmaWithExpertModel`, whose expert's norms are adaptive."""
        config = super().backbone_config()
        config.adaptive_norms = True
        return config
