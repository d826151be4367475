"""Samplers: how a policy turns noise into actions. One object per way to denoise, shared by heads.

Each has the same verbs: `draw_time` draws where on the way a training sample stands, `mix` puts actions and noise
there and says what the network is to predict, `times` are the stations of sampling, and `integrate` walks them.
A network is a callable here, so that whoever steers sampling from outside (real-time chunking) wraps it.

Shapes: b batch, h horizon, a action width, n steps of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..configuration.diffusion import DiffusionConfig
from ..errors import FeatureValueError, InvalidConfigError
from .seam import checked_draw


def draw_noise(
    shape: tuple[int, ...], given: torch.Tensor | None, generator: torch.Generator | None, device: torch.device | str
) -> torch.Tensor:
    """Return standard normal noise (b, h, a), float32: the given one, or drawn by `generator`.

    Raises:
        FeatureShapeError, FeatureValueError: the given noise has another shape, is not real or not finite.
    """
    if given is None:
        where = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=where).to(device)
    return checked_draw("noise", given, shape).to(device, torch.float32)


@dataclass(frozen=True)
class FlowSampler:
    """Follow a learned velocity on the straight line between noise and actions (Lipman et al. 2023, arXiv 2210.02747).

    Training times are `(start + slope · Beta(alpha, beta)) / scale`, which stay closer to noise: what noise is to
    become is the harder question.

    Args:
        noise_time: the time of pure noise, 1 (π0) or 0 (GR00T); that of actions is the other.
        alpha, beta, start, slope, scale: of the training times.
    """

    noise_time: int
    alpha: float
    beta: float
    start: float
    slope: float
    scale: float = 1.0

    def draw_time(self, batch_size: int, device: torch.device | str) -> torch.Tensor:
        """Draw training times (b,)."""
        drawn = torch.distributions.Beta(*torch.tensor([self.alpha, self.beta], device=device)).sample((batch_size,))
        return (self.start + self.slope * drawn) / self.scale

    def given_time(self, time: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return the caller's training times (b,), float32.

        Raises:
            FeatureShapeError, FeatureValueError: they have another shape, are not real or not finite.
        """
        return checked_draw("time", time, (batch_size,)).float()

    def mix(self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy actions (b, h, a) at times (b,), and the velocity there, which the network is to predict."""
        t = time[:, None, None]  # (b, 1, 1)
        if self.noise_time:
            return t * noise + (1 - t) * actions, noise - actions
        return (1 - t) * noise + t * actions, actions - noise

    def times(self, steps: int) -> list[float]:
        """Return the times of a sampling run, from noise on; the last step ends at the actions' time.

        Raises:
            InvalidConfigError: fewer than one step.
        """
        if steps < 1:
            raise InvalidConfigError(f"num_steps={steps} must be at least 1.")
        return [1 - i / steps if self.noise_time else i / steps for i in range(steps)]

    def integrate(
        self, noise: torch.Tensor, velocity: Callable[[torch.Tensor, int], torch.Tensor], steps: int
    ) -> torch.Tensor:
        """Return the actions (b, h, a) that `velocity(noisy actions, step)` leads to, by Euler's method."""
        length = -1 / steps if self.noise_time else 1 / steps
        x = noise
        for i in range(steps):
            x = torch.add(x, velocity(x, i), alpha=length)
        return x


class NoiseSchedule:
    """Add noise to actions by a schedule and take it away again.

    Betas and timesteps are those of diffusers' schedulers; the arithmetic of a step is theirs too. It is written out
    here because it must run on tensors alone: coefficients that are read from the host would make every step wait for
    the device. Sources: Ho et al. 2020 (arXiv 2006.11239) for DDPM, Song et al. 2020 (arXiv 2010.02502) for DDIM.

    Args:
        config: scheduler, betas, prediction type, clipping.
    """

    def __init__(self, config: DiffusionConfig):
        # Here, not above: it takes a second, which whoever uses another policy should not wait.
        from diffusers import DDIMScheduler, DDPMScheduler

        self.prediction_type = config.prediction_type
        self.draws_noise = config.noise_scheduler_type == "DDPM"
        self.clip_range = config.clip_sample_range if config.clip_sample else None
        kind = DDPMScheduler if self.draws_noise else DDIMScheduler
        # transformers builds policies on the meta device, where there are no numbers.
        with torch.device("cpu"):
            self._scheduler = kind(
                num_train_timesteps=config.num_train_timesteps,
                beta_schedule=config.beta_schedule,
                beta_start=config.beta_start,
                beta_end=config.beta_end,
                prediction_type=config.prediction_type,
            )
            kept = self._scheduler.alphas_cumprod  # share of the actions' variance that is left at each timestep
            self._levels = torch.stack([kept.sqrt(), (1 - kept).sqrt()]).tolist()
            # Known before a compiler sees the sampling loop.
            self._tables = {config.denoising_steps: self._table(config.denoising_steps)}

    # --- training -------------------------------------------------------------------------------------

    def draw_time(self, batch_size: int, device: torch.device | str) -> torch.Tensor:
        """Draw training timesteps (b,)."""
        return torch.randint(self._scheduler.config.num_train_timesteps, (batch_size,), device=device)

    def given_time(self, time: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return the caller's training timesteps (b,).

        Raises:
            FeatureShapeError, FeatureValueError: they have another shape, are not whole or no timesteps.
        """
        last = self._scheduler.config.num_train_timesteps - 1
        checked_draw("time", time, (batch_size,), whole=True)
        if not torch.compiler.is_compiling() and bool(((time < 0) | (time > last)).any()):
            raise FeatureValueError(f"time={time.tolist()} holds others than the timesteps from 0 to {last}.")
        return time.long()

    def mix(self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy actions (b, h, a) at timesteps (b,), and what the network is to predict from them."""
        signal, noisiness = torch.tensor(self._levels, device=actions.device)[:, time, None, None]  # (b, 1, 1)
        noisy = signal * actions + noisiness * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        if self.prediction_type == "sample":
            return noisy, actions
        return noisy, signal * noise - noisiness * actions

    # --- sampling -------------------------------------------------------------------------------------

    def times(self, steps: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the timesteps (n,) of a sampling run and the coefficients (n, 5) of its steps.

        Raises:
            InvalidConfigError: more steps than were trained, or fewer than one.
        """
        if steps not in self._tables:
            self._tables[steps] = self._table(steps)
        timesteps, coefficients = self._tables[steps]
        return torch.tensor(timesteps, device=device), torch.tensor(coefficients, device=device)

    def step_noises(
        self, shape: tuple[int, ...], steps: int, given: torch.Tensor | None, draw: Callable[[], torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Return the noise (b, h, a) that each step adds: DDPM's, except in the last step, where there is none.

        Args:
            shape: (b, h, a).
            steps: n.
            given: (n − 1, b, h, a); by default `draw` draws it, one step after the other.
            draw: returns new noise.

        Raises:
            FeatureShapeError, FeatureValueError: `given` has another shape, is not real or not finite.
        """
        draws = steps - 1 if self.draws_noise else 0
        if given is not None:
            checked_draw("step_noise", given, (draws, *shape))
        return [(draw() if given is None else given[i].float()) if i < draws else None for i in range(steps)]

    def integrate(
        self,
        noise: torch.Tensor,
        step: Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor],
        step_noises: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Return the actions (b, h, a) after all steps of `step(noisy actions, step, noise to add)`."""
        x = noise
        for i, added in enumerate(step_noises):
            x = step(x, i, added)
        return x

    def step(
        self,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        coefficients: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the actions (b, h, a) one step less noisy.

        Args:
            sample: (b, h, a) noisy actions.
            prediction: (b, h, a) of the network.
            coefficients: (5,), a row of `times`.
            noise: (b, h, a) to add, for DDPM; None in the last step and for DDIM.
        """
        signal, noisiness, of_clean, of_rest, spread = coefficients.unbind()
        if self.prediction_type == "epsilon":
            clean = (sample - noisiness * prediction) / signal
        elif self.prediction_type == "sample":
            clean = prediction
        else:
            clean = signal * sample - noisiness * prediction
        if self.draws_noise:
            rest = sample
        elif self.prediction_type == "epsilon":
            rest = prediction
        elif self.prediction_type == "sample":
            rest = (sample - signal * clean) / noisiness
        else:
            rest = signal * prediction + noisiness * sample
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
        sample = of_clean * clean + of_rest * rest
        return sample if noise is None else sample + spread * noise

    def _table(self, steps: int) -> tuple[list[int], list[list[float]]]:
        """Return timesteps and, per step, the levels of signal and noise, the weights of the estimated clean
        actions and of the rest (DDPM: of the sample, DDIM: of the noise), and the spread of the noise drawn."""
        trained = self._scheduler.config.num_train_timesteps
        if not 1 <= steps <= trained:
            raise InvalidConfigError(f"num_steps={steps} must lie between 1 and num_train_timesteps={trained}.")
        self._scheduler.set_timesteps(steps)
        timesteps = self._scheduler.timesteps
        kept = self._scheduler.alphas_cumprod[timesteps]  # (n,)
        kept_next = torch.cat([kept[1:], kept.new_ones(1)])  # of the less noisy actions that the step gives
        left, left_next = 1 - kept, 1 - kept_next
        if self.draws_noise:
            ratio = kept / kept_next
            of_clean = kept_next.sqrt() * (1 - ratio) / left
            of_rest = ratio.sqrt() * left_next / left
            spread = (left_next / left * (1 - ratio)).clamp(min=1e-20).sqrt()
        else:
            of_clean, of_rest, spread = kept_next.sqrt(), left_next.sqrt(), torch.zeros_like(kept)
        rows = torch.stack([kept.sqrt(), left.sqrt(), of_clean, of_rest, spread], dim=1)  # (n, 5)
        return timesteps.tolist(), rows.tolist()
