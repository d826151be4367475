"""Kill runs at random moments, go on with them, and compare what comes out with a run that nobody disturbed.

    python benchmarks/kills.py                       # 50 kills of trainings, 20 of each other run, some minutes
    python benchmarks/kills.py --kills 4 --only 0-workers record

Every training is a process group that SIGKILL ends: half of the kills come at a random time, half before a random file
operation of a checkpoint's writing or rotation. A killed training is started again with `resume_from_checkpoint`
until it finishes. Then weights, optimizer, learning-rate schedule, random state, log and the names of all files must
equal, to the bit, those of the uninterrupted run; times are left out.

Recordings, evaluations and conversions (`kills_of_runs.py`) are killed at a random time or before any random file
operation, and started again by the same call. Besides, every episode that was finished when a kill came must still be
there. Exit status 1 on any difference or loss.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from kills_of_runs import RUNS, Run, watch
from safetensors.torch import load_file
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from manipulators import (
    ACTConfig,
    ACTPolicy,
    LeRobotDataset,
    LeRobotWriter,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
)
from manipulators.training.augmentation import Augmentation

CAMERA, STATE = "observation.images.top", "observation.state"
FINAL, CACHE, LOG = "final", "cache", "log.txt"
TIMES = {"data_wait", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
TIMES |= {"milliseconds_per_action", "date"}
TIMES |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
TRAINING = Run(lambda folder: None)  # nothing to prepare, no episodes to count
FORK = multiprocessing.get_context("fork")
ARGUMENTS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,  # 5 batches an epoch, the last one smaller: 3 steps, the last one shorter
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 3,  # between two saves as well as at one
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "loss",
    "use_cpu": True,
    "disable_tqdm": True,
}
SETTINGS = {
    "0-workers": {"save_steps": 1, "save_total_limit": 2},
    "2-workers": {"save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 2},
    "0-workers-best": {"save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True},
    "0-workers-epochs": {
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "max_steps": 6,
    },
    "0-workers-ema": {"save_steps": 1, "save_total_limit": 2, "ema_decay": 0.99},
    "2-workers-ema": {"save_steps": 2, "save_total_limit": 2, "ema_decay": 0.99, "dataloader_num_workers": 2},
}


def record(root: Path) -> None:
    """Write a dataset of 3 episodes and 19 frames, with a camera."""
    features = {
        CAMERA: {"dtype": "video", "shape": [32, 32, 3]},
        STATE: {"dtype": "float32", "shape": [2]},
        "action": {"dtype": "float32", "shape": [2]},
    }
    noise = np.random.default_rng(0)
    with LeRobotWriter(root, 10, features) as writer:
        for length in (6, 6, 7):
            for _ in range(length):
                state = noise.normal(size=2).astype(np.float32)
                picture = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                writer.add_frame({CAMERA: picture, STATE: state, "action": 2 * state}, task="push")
            writer.end_episode()


def build_trainer(dataset: LeRobotDataset, folder: Path, setting: dict[str, Any]) -> PolicyTrainer:
    """Build the trainer of a tiny ACT with dropout, a drawn latent and moved pictures."""
    set_seed(0)
    config = ACTConfig(
        input_features={
            CAMERA: {"type": "VISUAL", "shape": [3, 32, 32]},
            STATE: {"type": "STATE", "shape": [2]},
        },
        output_features={"action": {"type": "ACTION", "shape": [2]}},
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=4,
        vision_config={"layer_type": "basic", "hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
        vision_norm="group",
        pretrained_backbone_weights=None,
    )
    processor = PolicyProcessor.from_config(config, dataset.statistics)
    arguments = PolicyTrainingArguments(str(folder), **ARGUMENTS | setting)
    return PolicyTrainer(
        ACTPolicy(config),
        arguments,
        processor,
        train_dataset=dataset,
        eval_dataset=torch.utils.data.Subset(dataset, range(4)),
        augmentation=Augmentation(shift=2, brightness=0.2),
    )


@dataclass
class Moment:
    """Say where a training is, and where it must die; shared between the processes.

    Args:
        saving: 1 while a checkpoint is written, published or rotated.
        operations: file operations of saves so far.
        fatal: the operation before which the training kills itself; 0 for none.
        finished: episodes that a recording or an evaluation has finished.
    """

    saving: Any = field(default_factory=lambda: FORK.RawValue("i", 0))
    operations: Any = field(default_factory=lambda: FORK.RawValue("i", 0))
    fatal: Any = field(default_factory=lambda: FORK.RawValue("i", 0))
    finished: Any = field(default_factory=lambda: FORK.RawValue("i", 0))

    def watch(self, trainer: PolicyTrainer) -> None:
        """Follow a trainer of this process."""
        save = trainer._save_checkpoint

        def watched(*args: Any, **kwargs: Any) -> None:
            self.saving.value = 1
            save(*args, **kwargs)
            self.saving.value = 0

        trainer._save_checkpoint = watched
        self.count_operations()

    def count_operations(self) -> None:
        """Count this process's file operations while `saving`, and kill it before the fatal one."""
        process = os.getpid()

        def count(event: str, _: tuple) -> None:
            if event in FILE_OPERATIONS and self.saving.value and os.getpid() == process:
                self.operations.value += 1
                if self.operations.value == self.fatal.value:
                    os.killpg(0, signal.SIGKILL)

        sys.addaudithook(count)


def train(root: Path, setting: dict[str, Any], folder: Path, moment: Moment) -> None:
    """Train to the end, from the last checkpoint where there is one; the body of a process."""
    set_up(folder)
    trainer = build_trainer(LeRobotDataset(root, action_horizon=4), folder, setting)
    moment.watch(trainer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    trainer.save_model(str(folder / FINAL))
    torch.save(trainer.optimizer.state_dict(), folder / FINAL / "optimizer.pt")
    trainer.state.save_to_json(str(folder / FINAL / "trainer_state.json"))


def go(run: Run, folder: Path, moment: Moment) -> None:
    """Run to the end, from what is finished; the body of a process."""
    set_up(folder)
    watch(partial(setattr, moment.finished, "value"))
    moment.saving.value = 1  # every file operation counts
    moment.count_operations()
    run.run(folder)


def set_up(folder: Path) -> None:
    """Give this process a group, a log and a cache of its own."""
    os.setsid()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    datasets.config.HF_DATASETS_CACHE = folder / CACHE


def attempt(body: Callable[[Path, Moment], None], folder: Path, moment: Moment, seconds: float | None) -> bool:
    """Run in a process group of its own, killed after so many seconds; return whether it finished.

    Raises:
        RuntimeError: it failed by itself.
    """
    moment.saving.value = moment.operations.value = moment.finished.value = 0
    process = FORK.Process(target=body, args=(folder, moment))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A run failed:\n{(folder / LOG).read_text(encoding='utf-8')[-6000:]}")
    return process.exitcode == 0


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a finished training left, by file name; times and the folder's own name are left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == LOG or name.startswith(f"{CACHE}/") or path.name == "training_args.bin":
            continue
        if path.suffix == ".lock":  # of a run that was killed; the next one takes it over
            continue
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            found[name] = torch.load(path, weights_only=True)
        elif path.name in ("trainer_state.json", "evaluation.json"):
            found[name] = _timeless(json.loads(path.read_text(encoding="utf-8").replace(str(folder), "")))
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of everything that is not equal to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
        return [] if same else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys(), key=str)
        return [found for key in keys for found in differences(one.get(key), other.get(key), f"{name}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{name}/{i}")]
    return [] if one == other else [name]


@dataclass
class Tally:
    """Count what happened under one setting."""

    kills: int = 0
    while_saving: int = 0
    runs: int = 0
    finished: int = 0
    lost: int = 0
    different: list[str] = field(default_factory=list)


def kill_and_compare(
    body: Callable[[Path, Moment], None], work: Path, kills: int, dice: random.Random, run: Run = TRAINING
) -> Tally:
    """Kill runs of one kind so many times, and compare each that finished with an undisturbed one.

    Args:
        body: what a process does in a folder.
        work: folder for the runs.
        kills: in all.
        dice: for the moments.
        run: prepares a folder, and counts what is finished there.
    """
    moment, tally = Moment(), Tally()

    def prepared(name: str) -> Path:
        folder = work / name
        folder.mkdir()
        run.prepare(folder)
        return folder

    undisturbed = prepared("undisturbed")
    began = time.monotonic()
    attempt(body, undisturbed, moment, None)
    seconds, operations = time.monotonic() - began, moment.operations.value
    expected = outcome(undisturbed)
    while tally.kills < kills:
        folder = prepared("killed")
        finished = False
        while not finished:
            limit, moment.fatal.value = None, 0
            if tally.kills < kills and dice.random() < 0.5:
                limit = dice.uniform(0, seconds)
            elif tally.kills < kills:
                moment.fatal.value = dice.randint(1, operations)
            before = run.finished(folder)
            finished = attempt(body, folder, moment, limit)
            tally.kills += not finished
            tally.while_saving += not finished and moment.saving.value
            if not finished:
                should = max(before, moment.finished.value)
                tally.finished += should
                tally.lost += max(0, should - run.finished(folder))
        tally.runs += 1
        tally.different += differences(expected, outcome(folder))
        shutil.rmtree(folder)
    return tally


def main() -> int:
    """Run every setting, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of trainings, shared among their settings")
    parser.add_argument("--kills-each", type=int, default=20, help="of each other run")
    kinds = [*SETTINGS, *RUNS]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="what to run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # every run is a fork of this process, which threads do not survive
    dice = random.Random(arguments.seed)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "dataset")
        record(root)
        trainings = [name for name in arguments.only if name in SETTINGS]
        if trainings:
            print("| setting | kills | of which during a save | runs | identical |\n|---|---|---|---|---|")
        for index, name in enumerate(trainings):
            kills = len(range(index, arguments.kills, len(trainings)))
            tally = kill_and_compare(partial(train, root, SETTINGS[name]), _made(folder, name), kills, dice)
            identical = "no" if tally.different else "yes"
            print(f"| {name} | {tally.kills} | {tally.while_saving} | {tally.runs} | {identical} |", flush=True)
            wrong += [f"{name}: {found}" for found in tally.different]
        others = [name for name in arguments.only if name in RUNS]
        if others:
            print("\n| run | kills | runs | finished episodes | lost | identical |\n|---|---|---|---|---|---|")
        for name in others:
            run = RUNS[name]
            tally = kill_and_compare(partial(go, run), _made(folder, name), arguments.kills_each, dice, run)
            identical = "no" if tally.different else "yes"
            print(
                f"| {name} | {tally.kills} | {tally.runs} | {tally.finished} | {tally.lost} | {identical} |",
                flush=True,
            )
            wrong += [f"{name}: {found}" for found in tally.different] + [f"{name}: lost"] * bool(tally.lost)
    if wrong:
        print(f"\n{len(wrong)} differences:", *wrong[:20], sep="\n")
    return 1 if wrong else 0


def _made(folder: str, name: str) -> Path:
    work = Path(folder, name)
    work.mkdir()
    return work


if __name__ == "__main__":
    sys.exit(main())
