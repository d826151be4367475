"""A user's own policy in a module of the working directory, as test_plugins.py puts it there; see external/ too."""

import torch
from torch import nn

from manipulators import BasePolicyModel, PolicyConfig


class LinearConfig(PolicyConfig):
    """Configure the policy below."""

    model_type = "linear_policy"
    horizon_field = "chunk_size"

    chunk_size: int = 4
    n_action_steps: int | None = None


@BasePolicyModel.register("linear_policy")
class LinearPolicy(BasePolicyModel):
    """Predict a chunk from the state by one layer."""

    def __init__(self, config: LinearConfig):
        super().__init__()
        self.layer = nn.Linear(config.state_dim, config.chunk_size * config.action_dim)

    def forward(self, batch, train=True, **kwargs):
        return self.layer(batch["observation.state"]).unflatten(-1, (self.config.chunk_size, self.config.action_dim))

    def calc_loss(self, batch):
        return torch.nn.functional.mse_loss(self.forward(batch), batch["action"])

    def inference(self, batch):
        return {"action_pred": self.forward(batch)}
