"""FlowPolicy: what policies share that follow a learned velocity from noise to a chunk of actions."""

from __future__ import annotations

from typing import Any

import torch

from ..policy import LABELS, PolicyModel


class FlowPolicy(PolicyModel):
    """Be a policy whose `forward` samples by `noise` and `num_steps` where it is given no labels."""

    @torch.no_grad()
    def predict_action_chunk(
        self,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return a sampled chunk (b, h, a), normalised and padded; labels among inputs are ignored.

        Args:
            noise: (b, h, a) to start from; drawn when None, with `generator` if given.
            generator: of the noise.
            num_steps: Euler steps; by default the config's.
            inputs: as in `forward`.
        """
        if noise is None and generator is not None:
            shape = (len(inputs["state"]), self.config.action_horizon, self.config.model_action_dim)
            noise = torch.randn(shape, generator=generator, device=generator.device).to(self.device)
        observation = {name: value for name, value in inputs.items() if name not in LABELS}
        return self(**observation, noise=noise, num_steps=num_steps).actions
