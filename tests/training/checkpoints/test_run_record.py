"""A run that goes on is the one that wrote the checkpoint: same data, same policy, same arguments."""

import json
import logging
import shutil

import datasets
import numpy as np
import pytest
import torch

from manipulators import ACTConfig, ACTPolicy, LeRobotDataset, LeRobotWriter, PolicyProcessor, PolicyTrainer
from manipulators import PolicyTrainingArguments as Arguments
from manipulators.data.identity import identity_of
from manipulators.errors import ResumeMismatchError
from manipulators.training.augmentation import Augmentation
from manipulators.training.checkpoints.folders import load_progress

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
}


def write(root, scale=1.0, task="push"):
    """Write 3 episodes of 6 frames, whose actions are multiplied by `scale`."""
    noise = np.random.default_rng(0)
    with LeRobotWriter(root, 10, FEATURES) as writer:
        for _ in range(3):
            for _ in range(6):
                state = noise.normal(size=2).astype(np.float32)
                writer.add_frame({"observation.state": state, "action": np.float32(scale) * state}, task=task)
            writer.end_episode()
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("resuming")
        write(folder / "data")
        build(folder).train()
        yield folder


def build(folder, data="data", scale=None, augmentation=None, episodes=None, statistics=None, config=None, **changed):
    dataset = LeRobotDataset(folder / data, action_horizon=4, episodes=episodes)
    torch.manual_seed(0)
    fields = {"chunk_size": 4, "dim_model": 16, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1}
    policy_config = ACTConfig.for_dataset(dataset, **fields | {"use_vae": False} | (config or {}))
    processor = PolicyProcessor.from_config(policy_config, statistics or dataset.statistics)
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "steps"}
    arguments |= {"save_steps": 1, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1} | changed
    return PolicyTrainer(
        ACTPolicy(policy_config),
        Arguments(str(folder / "run"), **arguments),
        processor,
        train_dataset=dataset,
        augmentation=augmentation,
    )


MEAN_STD = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "MEAN_STD"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"learning_rate": 1e-4}, ["arguments.learning_rate"]),
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 1},
            ["arguments.lr_scheduler_type", "arguments.warmup_steps"],
        ),
        ({"per_device_train_batch_size": 2}, ["arguments.samples_per_step"]),
        ({"seed": 1}, ["arguments.seed"]),
        ({"tune_diffusion_model": True}, ["arguments.tune_diffusion_model"]),
        ({"config": {"n_action_steps": 2}}, ["config.n_action_steps"]),
        (
            {"config": {"normalization_mapping": MEAN_STD | {"ACTION": "MIN_MAX"}}},
            ["config.normalization_mapping.ACTION", "processor.normalization_mapping.ACTION"],
        ),
        ({"episodes": [0, 2]}, ["dataset.episodes", "dataset.frames", "dataset.samples", "dataset.values"]),
        ({"augmentation": Augmentation(shift=2)}, ["augmentation"]),
    ],
    ids=str,
)
def test_what_decides_a_step_may_not_change(folder, change, names):
    with pytest.raises(ResumeMismatchError) as error:
        build(folder, **change).train(resume_from_checkpoint=True)
    assert sorted(name for name, *_ in error.value.different) == sorted(names)
    assert all(f"{name}: " in str(error.value) for name in names)
    assert "run/checkpoint-2 was written by another run" in str(error.value)


def test_data_of_the_same_shape_is_told_apart(folder):
    """Actions times 100, with statistics as they were: only the numbers themselves tell."""
    write(folder / "scaled", scale=100.0)
    write(folder / "copied")
    write(folder / "renamed", task="pull")
    statistics = LeRobotDataset(folder / "data").statistics
    with pytest.raises(ResumeMismatchError) as error:
        build(folder, data="scaled", statistics=statistics).train(resume_from_checkpoint=True)
    assert [name for name, *_ in error.value.different] == ["dataset.values"]
    prints = {name: identity_of(LeRobotDataset(folder / name)) for name in ("data", "copied", "renamed")}
    assert prints["data"] == prints["copied"]
    assert {n for n, v in prints["renamed"].items() if v != prints["data"][n]} == {"instructions"}


def test_what_decides_no_step_may_change_and_time_adds_up(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("manipulators"), "propagate", True)
    changed = {"max_steps": 3, "logging_steps": 3, "save_steps": 3, "dataloader_num_workers": 0, "report_to": "none"}
    trainer = build(folder, **changed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert "max_steps was 2 and is 3" in caplog.text
    record = json.loads((folder / "run" / "checkpoint-3" / "run.json").read_text())
    assert (record["dataset"]["episodes"], record["dataset"]["samples"]) == ("0-2", 18)
    again = build(folder, **changed)
    again.train(resume_from_checkpoint=True)  # at its end: nothing is left to do
    before, after = (load_progress(folder / "run" / f"checkpoint-{step}")[1]["seconds"] for step in (2, 3))
    assert 0 < before < after < trainer.training_seconds
    assert after < again.training_seconds


def test_another_number_of_processes_is_said_or_refused(folder, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("manipulators"), "propagate", True)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(folder / "run" / checkpoint.name, checkpoint)
    record = json.loads((checkpoint / "run.json").read_text())
    assert record.pop("processes") == 1

    def resume(samples, **processes):
        changed = record | {"arguments": record["arguments"] | {"samples_per_step": samples}} | processes
        (checkpoint / "run.json").write_text(json.dumps(changed))
        build(folder).train(resume_from_checkpoint=str(checkpoint))

    resume(4)  # as an earlier version wrote it
    assert caplog.text == ""
    resume(4, processes=2)
    assert "The run goes on in 1 processes, and was in 2. Its steps hold as many samples" in caplog.text
    with pytest.raises(ResumeMismatchError, match=r"samples_per_step: 8 there, 4 here[^$]*processes: 2 there, 1 here"):
        resume(8, processes=2)


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_it_can_be(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("manipulators"), "propagate", True)
    for path in (folder / "run").glob("checkpoint-*/run.json"):
        path.unlink()
    with pytest.raises(ResumeMismatchError, match=r"config\.dropout: 0\.1 there, 0\.2 here"):
        build(folder, config={"dropout": 0.2}).train(resume_from_checkpoint=True)
    trainer = build(folder, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "has no run.json" in caplog.text
