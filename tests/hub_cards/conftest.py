"""Cards of a policy with and without a camera, an evaluation and a training log."""

import pytest

from manipulators import FeatureType, PolicyFeature
from manipulators.configuration.contract import ContractEntry, vector_entry
from manipulators.configuration.normalization import Part
from manipulators.hub_cards.card import CardData

STATE = vector_entry(
    "observation.state",
    PolicyFeature("STATE", (4,)),
    [Part("state", 4, "MEAN_STD")],
    names=["hand x", "hand y", "hand z", "gripper"],
    units=["m", "m", "m", "share of fully open"],
    low=[-0.1, 0.4, 0.05, 0],
    high=[0.12, 0.8, 0.31, 1],
)
CAMERA = ContractEntry("observation.images.corner", FeatureType.VISUAL, (3, 240, 320))
ACTION = vector_entry("action", PolicyFeature("ACTION", (2,)), [Part("action", 2, "MIN_MAX")], names=["reach", "grip"])

EVALUATION = {
    "environment": "metaworld/reach-v3",
    "episodes": 50,
    "success_rate": 0.98,
    "interval": [0.895, 0.9965],
    "seeds": list(range(10000, 10050)),
    "mean_return": 812.43,
    "mean_length": 61.3,
    "milliseconds_per_action": 3.21,
    "num_envs": 10,
    "clipped_fraction": 0.031,
    "horizon": 500,
    "command": "manipulators eval your-lab/act-reach --env metaworld/reach-v3 --episodes 50",
    "per_episode": [],  # evaluation.json holds more than the card shows
}
LOG = [
    {"step": 10, "epoch": 0.5, "loss": 2.0, "l1": 0.8, "kl": 0.12, "learning_rate": 1e-5, "grad_norm": 3.0},
    {"step": 10, "eval_loss": 2.2, "eval_runtime": 1.0},
    {"step": 20, "epoch": 1.0, "loss": 0.5, "l1": 0.3, "kl": 0.02, "learning_rate": 1e-5, "grad_norm": 1.0},
    {"step": 20, "train_loss": 1.25, "train_runtime": 5025.0},
]


@pytest.fixture
def make_card():
    """Build a card of an unevaluated ACT policy; keywords replace its values."""

    def make(**changes) -> CardData:
        values = {
            "policy_name": "ACT",
            "model_type": "act_policy",
            "parameters": 51597190,
            "inputs": [STATE],
            "outputs": [ACTION],
            "repo_id": "your-lab/act-reach",
        }
        return CardData(**{**values, **changes})

    return make


@pytest.fixture
def evaluation() -> dict:
    """The content of an evaluation.json."""
    return dict(EVALUATION)


@pytest.fixture
def full_card(make_card):
    """A card with everything: camera, instruction, data, training, evaluation."""
    return make_card(
        inputs=[STATE, CAMERA],
        action_horizon=100,
        n_action_steps=50,
        control_rate_hz=80,
        instruction="reach the red ball",
        dataset={"name": "your-lab/reach-demos", "episodes": 50, "frames": 4213, "tasks": 1},
        training={
            "steps": 20000,
            "batch_size": 8,
            "learning_rate": {"backbone": 1e-5, "rest": 1e-4},
            "seconds": 5025,
            "hardware": "1 × NVIDIA H200",
            "losses": {"loss": 0.5, "l1": 0.3, "kl": 0.02},
            "command": "manipulators train act_scratch.yaml --dataset your-lab/reach-demos",
        },
        log_history=LOG,
        evaluation=EVALUATION,
        base_model="your-lab/act-base",
        limits=["The red ball must be\nin view."],
        versions={"manipulators": "0.1.0", "torch": "2.13.0"},
    )
