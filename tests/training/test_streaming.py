"""Training on a stream: steps are counted, samples shared, and a run that goes on reads only what is left."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from manipulators import LeRobotWriter, StreamingLeRobotDataset
from manipulators.errors import InvalidConfigError, InvalidRecipeError, ResumeMismatchError
from manipulators.training.runs.build import open_dataset
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.runs.run import run_recipe

from .stream_in_processes import build

SCRIPT = Path(__file__).with_name("stream_in_processes.py")
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
}
SAMPLES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four episodes of ten frames, a file each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        root = tmp_path_factory.mktemp("streams") / "data"
        noise = np.random.default_rng(0)
        with LeRobotWriter(root, 10, FEATURES, data_files_size_in_mb=1e-6) as writer:
            for _ in range(4):
                for _ in range(10):
                    state = noise.normal(size=2).astype(np.float32)
                    writer.add_frame({"observation.state": state, "action": state}, task="push")
                writer.end_episode()
        yield root


def expected(root, seed, rank=0, processes=1, passes=2):
    """Return the numbers of the samples of some passes."""
    stream = StreamingLeRobotDataset(root, action_horizon=4, shuffle_buffer=8, seed=seed).split(rank, processes)
    return [int(sample["index"]) for sample in itertools.islice(stream.repeat(), passes * SAMPLES // processes)]


def seen(collator):
    return list(itertools.chain(*collator.seen))


def test_resuming_equals_an_uninterrupted_run_and_reads_only_what_is_left(folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "seed": 3, "max_steps": 7}
    whole, collator = build(folder, tmp_path / "whole", **saving)  # 56 samples: more than a pass
    whole.train()
    assert seen(collator)[:56] == expected(folder, 3)[:56]
    half, _ = build(folder, tmp_path / "half", dataloader_num_workers=2, **saving)
    half.train()
    for step in (3, 5):  # in the middle of a pass, and at its end
        resumed, collator = build(folder, tmp_path / "half", **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"half/checkpoint-{step}"))
        assert seen(collator)[: 56 - 8 * step] == expected(folder, 3)[8 * step : 56]
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), name
    with pytest.raises(ResumeMismatchError, match=r"dataset\.shuffle_buffer: 8 there, 4 here"):
        build(folder, tmp_path / "whole", stream={"shuffle_buffer": 4}, **saving)[0].train(True)


def test_epochs_are_refused(folder, tmp_path):
    with pytest.raises(InvalidConfigError, match=r"max_steps.*40 samples takes 10 steps of 4 samples"):
        build(folder, tmp_path, max_steps=-1)


def test_transformers_own_trainer(folder, tmp_path):
    options = {"trainer": Trainer, "arguments": TrainingArguments, "remove_unused_columns": False}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "dataloader_num_workers": 0}
    whole, _ = build(folder, tmp_path / "whole", **options, **saving)
    whole.train()
    resumed, collator = build(folder, tmp_path / "whole", **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert seen(collator)[:16] == expected(folder, 0)[:16]  # it reads what it skips
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_processes_share_the_samples_of_a_pass(folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, SCRIPT, folder, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    shares = [list(itertools.chain(*json.loads((tmp_path / f"{rank}.json").read_text()))) for rank in (0, 1)]
    for rank, share in enumerate(shares):
        assert share[:28] == expected(folder, 42, rank, 2)[:28]
    assert sorted(shares[0][:20] + shares[1][:20]) == list(range(SAMPLES))


RECIPE = """
policy: act_policy
data: {dataset: DATA, streaming: true, shuffle_buffer: 8, cache_gb: 0.5}
output: OUT
config: {chunk_size: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1, use_vae: false}
training: {max_steps: 2, per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true}
relative_actions: true
"""


def test_a_recipe_streams(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(folder)).replace("OUT", str(tmp_path / "out")))
    output = run_recipe(load_recipe(path))
    assert json.loads((output / "training.json").read_text())["dataset"]["frames"] == SAMPLES
    steps = "training.max_steps"
    with pytest.raises(InvalidRecipeError, match=r"training: A training on a stream counts steps.*--training\.max_"):
        run_recipe(load_recipe(path, [(steps, "-1"), ("output", str(tmp_path / "other"))]))
    with pytest.raises(InvalidRecipeError, match=r"shuffle_buffer, cache_gb belong to a stream"):
        open_dataset(load_recipe(path, [("data.streaming", "false")]))
    with pytest.raises(InvalidConfigError, match="decoded_cache"):
        open_dataset(load_recipe(path, [("data.decoded_cache", "x")]))
