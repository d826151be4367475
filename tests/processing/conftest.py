"""A policy with two observations of history, and processors for it."""

import pytest

from manipulators import PolicyConfig, PolicyProcessor


class HistoryConfig(PolicyConfig):
    """A policy that looks at two observations."""

    model_type = "history_processor_for_tests"
    n_obs_steps: int = 2

    @property
    def action_horizon(self) -> int:
        return 4


@pytest.fixture
def history_processor(statistics_of):
    config = HistoryConfig(
        input_features={
            "observation.images.top": {"type": "VISUAL", "shape": (3, 4, 6)},
            "observation.state": {"type": "STATE", "shape": (2,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (2,)}},
    )
    return PolicyProcessor.from_config(config, statistics_of(config))


@pytest.fixture
def plain():
    """Two 4 × 6 cameras, a state and an environment state; nothing is rescaled, so that numbers stay readable."""
    return PolicyProcessor(
        input_features={
            "observation.images.wrist": {"type": "VISUAL", "shape": (3, 4, 6)},
            "observation.images.above": {"type": "VISUAL", "shape": (3, 4, 6)},
            "observation.state": {"type": "STATE", "shape": (3,)},
            "observation.environment_state": {"type": "ENV", "shape": (1,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (2,)}},
        normalization_mapping=dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "IDENTITY"),
    )
