"""Configuration of MLPPolicy."""

from typing import ClassVar

from .diffusion import DiffusionConfig
from .policy import PolicyConfig


class MLPConfig(PolicyConfig):
    """Configure a small policy: two layers read the states, a U-Net denoises the actions.

    Args:
        chunk_size (`int`, *optional*, defaults to 16): actions predicted at once.
        n_action_steps (`int`, *optional*): actions executed before the next prediction; by default all of them.
        hidden_size (`int`, *optional*, defaults to 64): width of the layers.
        fields: see `PolicyConfig`.
    """

    model_type = "mlp_policy"
    horizon_field: ClassVar[str] = "chunk_size"

    chunk_size: int = 16
    n_action_steps: int | None = None
    hidden_size: int = 64

    @property
    def head_config(self) -> DiffusionConfig:
        """The config of the action head."""
        return DiffusionConfig(
            horizon=self.chunk_size,
            n_action_steps=self.n_action_steps,
            n_obs_steps=1,
            down_dims=(16, 32),
            n_groups=4,
            kernel_size=3,
            num_train_timesteps=10,
            noise_scheduler_type="DDIM",
            output_features=self.output_features,
        )

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict:
        """Return the random numbers of a forward pass; see `PolicyConfig.example_draws`."""
        return self.head_config.example_draws(batch_size, training)
