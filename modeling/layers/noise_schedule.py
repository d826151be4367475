"""NoiseSchedule: how actions are noised in training, and denoised step by step.

Betas and timesteps are those of diffusers' schedulers; the arithmetic of a step is theirs too. It is written out
here because it must run on tensors alone: coefficients that are read from the host would make every step wait for
the device. Sources: Ho et al. 2020 (arXiv 2006.11239) for DDPM, Song et al. 2020 (arXiv 2010.02502) for DDIM.

Shapes: b batch, h horizon, a action width, n denoising steps.
"""

from __future__ import annotations

import torch

from ...configuration.diffusion import DiffusionConfig
from ...errors import InvalidConfigError


class NoiseSchedule:
    """Add noise to actions and take it away again.

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

    def add_noise(
        self, actions: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy actions (b, h, a) at timesteps (b,), and what the network is to predict from them."""
        signal, noisiness = torch.tensor(self._levels, device=actions.device)[:, timesteps, None, None]  # (b, 1, 1)
        noisy = signal * actions + noisiness * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        if self.prediction_type == "sample":
            return noisy, actions
        return noisy, signal * noise - noisiness * actions

    # --- sampling -------------------------------------------------------------------------------------

    def steps(self, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the timesteps (n,) of a denoising run and the coefficients (n, 5) of its steps.

        Raises:
            InvalidConfigError: more steps than were trained, or fewer than one.
        """
        if n not in self._tables:
            self._tables[n] = self._table(n)
        timesteps, coefficients = self._tables[n]
        return torch.tensor(timesteps, device=device), torch.tensor(coefficients, device=device)

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
            coefficients: (5,), a row of `steps`.
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

    def _table(self, n: int) -> tuple[list[int], list[list[float]]]:
        """Return timesteps and, per step, the levels of signal and noise, the weights of the estimated clean
        actions and of the rest (DDPM: of the sample, DDIM: of the noise), and the spread of the noise drawn."""
        trained = self._scheduler.config.num_train_timesteps
        if not 1 <= n <= trained:
            raise InvalidConfigError(f"num_steps={n} must lie between 1 and num_train_timesteps={trained}.")
        self._scheduler.set_timesteps(n)
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
