"""VisionLanguageActionPolicy: the inputs that π0 and GR00T share."""

from __future__ import annotations

import torch

from ..output import PolicyOutput
from ..policy import PolicyModel
from ..seam import Draws, Labels, PolicyInputs


class VisionLanguageActionPolicy(PolicyModel):
    """Map pictures, an instruction and the robot's state to a chunk of actions by following a learned velocity.

    States and actions have the padded widths of the config: the processor pads and takes the padding off again.
    """

    supports_gradient_checkpointing = True

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
            pixel_mask: (b, v) bool, False where a camera is absent; image tokens in a prompt are then absent too.
            input_ids: (b, n) the instruction; GR00T's prompt, with its image tokens and padded on the left.
            attention_mask: (b, n), 0 where it is padded.
            state: (b, s) normalised, padded with zeros.
            embodiment_id: (b,) int64, the slot of each robot's projectors, where the policy has them.
            actions: (b, h, a) normalised labels, padded with zeros.
            action_is_pad: (b, h) bool, True where a step lies beyond the episode.
            action_mask: (b, h, a) bool, False in padded dimensions; by default those beyond the action's width.
            noise: (b, h, a) to mix actions with, or to start sampling from; drawn when None.
            time: (b,) flow times of the mixture; drawn when None. Noise is at 1 in π0, at 0 in GR00T.
            num_steps: of sampling; by default the config's.
            return_loss: sample instead when False.

        Returns:
            `PolicyOutput` with `loss` and `losses` (`flow`), or with `actions` (b, h, a), normalised and padded.
        """
        inputs = PolicyInputs(pixel_values, pixel_mask, state, None, input_ids, attention_mask, embodiment_id)
        labels = Labels(actions, action_is_pad, action_mask)
        return super().forward(inputs, labels, Draws(noise, time, num_steps=num_steps), return_loss)
