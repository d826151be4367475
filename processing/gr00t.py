"""Processors of GR00T N1.5 and N1: Eagle's pictures and prompts, and states and actions normalised part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..configuration.features import ACTION
from ..configuration.gr00t import NEW_EMBODIMENT, GR00TConfig
from ..configuration.gr00t_n1 import GR00TN1Config
from ..configuration.gr00t_n1_5 import GR00TN1_5Config
from ..errors import CheckpointError
from .eagle import IMAGE_TOKEN, EagleInstructionN1, EagleInstructionN1_5
from .observation import Observation
from .pictures import CroppedPictures
from .processor import PolicyProcessor
from .robots import RobotsInParts
from .vectors import PaddedVectors


@dataclass(kw_only=True)
class GR00TVectors(PaddedVectors):
    """Pad states and actions, and say which robot they are of; see `PaddedVectors`.

    Args:
        max_state_dim (`int`, *optional*, defaults to 64): width of the network's states.
    """

    max_state_dim: int = 64

    def encode_states(self, observation: Observation) -> dict[str, torch.Tensor]:
        """Return `state` (b, s), and `embodiment_id` (b,) int64, the slot of the robot in use."""
        slots = torch.full((observation.batch_size,), self.robots.slot)
        return super().encode_states(observation) | {"embodiment_id": slots}


class GR00TProcessor(PolicyProcessor):
    """Prepare observations for GR00T, and bring its chunks back to robot units; see `PolicyProcessor` and the parts.

    Every camera that is present has its image tokens in the prompt. A state may come whole, as `observation.state`, or
    as NVIDIA's users have it, as `state.<part>` for every part.

    Args:
        tokens_per_image (`int`, *optional*): image tokens of a picture; by default the published model's.
        embodiment (`str`, *optional*, defaults to `"new_embodiment"`): which robot it is.
        embodiment_ids (`dict[str, int]`, *optional*): robot → the slot that its projectors have in the network; by
            default the published model's.
    """

    robots_class = RobotsInParts
    pictures_class = CroppedPictures
    vectors_class = GR00TVectors
    policy_config: ClassVar[type[GR00TConfig]]  # whose defaults are the published model's

    def __init__(self, *args, tokens_per_image=None, embodiment=NEW_EMBODIMENT, embodiment_ids=None, **fields):
        published = self.policy_config
        super().__init__(
            *args,
            tokens_per_image=tokens_per_image or published.eagle_class().image_tokens(),
            embodiment=embodiment,
            embodiment_ids=published.default_embodiments if embodiment_ids is None else embodiment_ids,
            **fields,
        )

    @classmethod
    def from_config(cls, config: GR00TConfig, statistics: Mapping | None = None, **fields: Any) -> GR00TProcessor:
        """Build the processor of a policy's config, for its robot; see `PolicyProcessor.from_config`."""
        return super().from_config(config, statistics, **{"embodiment": config.embodiment_tag} | fields)

    def split_actions(self, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return actions in robot units (…, a) by part: `{"action.<part>": (…, width)}`."""
        parts = self.robots.parts(ACTION)
        pieces = actions.split([part.width for part in parts], dim=-1)
        return {f"action.{part.name}": piece for part, piece in zip(parts, pieces, strict=True)}

    def check_agreement(self, config: GR00TConfig) -> None:
        """Check that this processor feeds the policy that `config` describes.

        Raises:
            CheckpointError: features, parts, sizes, widths or the robot differ, or tokens have other ids.
        """
        super().check_agreement(config)
        # Of several robots, one may be chosen after loading.
        if not self.embodiments and self.embodiment != config.embodiment_tag:
            raise CheckpointError(
                f"The processor has the statistics of {self.embodiment!r}, the policy's embodiment_tag is "
                f"{config.embodiment_tag!r}. Build it from the policy's config: "
                f"{type(self).__name__}.from_config(config, statistics)."
            )
        mine, theirs = self.instruction.image_token_id, config.image_token_index
        if theirs not in (None, mine):
            raise CheckpointError(
                f"{IMAGE_TOKEN} has the id {mine} in the tokenizer, but the policy looks for {theirs}. Take the "
                f"tokenizer that it was trained with; the config of a policy trained anew must say {mine}."
            )


class GR00TN1_5Processor(GR00TProcessor):
    """Prepare observations for GR00T N1.5; see `GR00TProcessor`."""

    instruction_class = EagleInstructionN1_5
    policy_config = GR00TN1_5Config


class GR00TN1Processor(GR00TProcessor):
    """Prepare observations for GR00T N1; see `GR00TProcessor`."""

    instruction_class = EagleInstructionN1
    policy_config = GR00TN1Config
