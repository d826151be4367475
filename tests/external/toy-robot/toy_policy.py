"""A policy in a package of its own: a config, a backbone, a processor, and the decorator that registers them."""

from dataclasses import dataclass

from torch import nn

from manipulators import (
    DiffusionConfig,
    Draws,
    Features,
    Labels,
    PolicyConfig,
    PolicyInputs,
    PolicyModel,
    PolicyProcessor,
    register_policy,
)
from manipulators.modeling.action_heads.diffusion import UnetActionHead
from manipulators.processing.vectors import Vectors


class ToyConfig(PolicyConfig):
    model_type = "toy_policy"
    horizon_field = "chunk_size"
    default_normalization = dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MIN_MAX")

    chunk_size: int = 4
    n_action_steps: int | None = None
    width: int = 32

    @property
    def head_config(self):
        fields = {"down_dims": (16, 32), "n_groups": 4, "kernel_size": 3, "noise_scheduler_type": "DDIM"}
        fields |= {"horizon": self.chunk_size, "n_action_steps": self.n_action_steps, "n_obs_steps": 1}
        return DiffusionConfig(num_train_timesteps=10, output_features=self.output_features, **fields)

    def example_draws(self, batch_size=2, training=False):
        return self.head_config.example_draws(batch_size, training)


class ToyBackbone(nn.Module):
    parameter_parts = lora_targets = {"tune_projector": ("layer",)}

    def __init__(self, config):
        super().__init__()
        self.width = config.width
        self.layer = nn.Linear(config.state_dim, config.width)

    def encode(self, inputs):
        return Features(self.layer(inputs.state)[:, None])  # (b, 1, d)


@dataclass(kw_only=True)
class ClippedVectors(Vectors):
    largest: float = 5.0  # of a normalised value; saved in processor_config.json

    def encode(self, name, x):
        return super().encode(name, x).clamp(-self.largest, self.largest)


class ToyProcessor(PolicyProcessor):
    vectors_class = ClippedVectors


@register_policy("toy_policy", processor=ToyProcessor, title="Toy")
class ToyPolicy(PolicyModel):
    config_class = ToyConfig

    def __init__(self, config):
        config.require_features()
        super().__init__(config)
        self.backbone = ToyBackbone(config)
        self.action_head = UnetActionHead(config.head_config, self.backbone.width)
        self.post_init()

    def forward(self, state=None, actions=None, action_is_pad=None, noise=None, time=None, return_loss=True):
        labels = Labels(actions, action_is_pad)
        return super().forward(PolicyInputs(state=state), labels, Draws(noise, time), return_loss)
