"""A policy small enough to train in a second, and demonstrations it can learn."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from manipulators import ACTConfig, ACTPolicy, PolicyProcessor, PolicyTrainingArguments

CAMERA = "observation.images.top"


class Demonstrations(Dataset):
    """Samples in memory, under the names and shapes that `LeRobotDataset` gives them."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    logging.disable_progress_bar()


def tiny_policy(camera=False, seed=0, **changes):
    """Build an ACT policy of width 16, with the same weights every time; keywords change its config."""
    features = {"observation.state": {"type": "STATE", "shape": [3]}}
    if camera:
        features[CAMERA] = {"type": "VISUAL", "shape": [3, 32, 32]}
    values = {
        "chunk_size": 4,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 32,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
        "latent_dim": 4,
        "pretrained_backbone_weights": None,
        "vision_config": {
            "layer_type": "basic",
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "embedding_size": 8,
        },
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    }
    torch.manual_seed(seed)
    return ACTPolicy(ACTConfig(**values | changes))


def tiny_processor(policy):
    """Build the processor of a policy, with statistics that leave numbers almost as they are."""
    statistics = {
        "observation.state": {"mean": [0.0] * 3, "std": [2.0] * 3},
        CAMERA: {"mean": [[[0.5]]] * 3, "std": [[[0.25]]] * 3},
        "action": {"mean": [1.0, -1.0], "std": [2.0, 0.5], "min": [-9.0, -9.0], "max": [9.0, 9.0]},
    }
    return PolicyProcessor.from_config(policy.config, statistics)


def demonstrations(count=12, camera=False, seed=1):
    """Build samples whose action is a function of their state; the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        state = torch.randn(3, generator=generator)
        sample = {
            "observation.state": state,
            "action": torch.stack([state[:2] * (step + 1) for step in range(4)]),
            "action_is_pad": torch.zeros(4, dtype=torch.bool),
            "task": "push",
            "index": torch.tensor(len(samples)),
        }
        if camera:
            sample[CAMERA] = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        samples.append(sample)
    return Demonstrations(samples)


@pytest.fixture
def make_policy():
    return tiny_policy


@pytest.fixture
def make_processor():
    return tiny_processor


@pytest.fixture
def make_dataset():
    return demonstrations


@pytest.fixture
def make_arguments(tmp_path):
    """Build training arguments for the CPU that log every step; keywords change them."""

    def make(output="run", **changes):
        values = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return PolicyTrainingArguments(str(tmp_path / output), **values | changes)

    return make
