"""Run a recipe: demonstrations in, a trained, measured and described policy out."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed
from transformers.utils import logging

from ..._files import refuse_existing, replace_files, write_text
from ..._lock import locked
from ..._processes import is_lost_contact, launched
from ..._version import __version__
from ...configuration.features import ACTION
from ...configuration.mixture import slot_fields
from ...data.mixture import MixtureDataset
from ...errors import (
    InvalidConfigError,
    InvalidRecipeError,
    ManipulatorsError,
    MissingFileError,
    OutputExistsError,
    UnfinishedRunError,
)
from ...hub_cards.checkpoint_card import EVALUATION_FILE, TRAINING_FILE, VIDEO_FILE, write_checkpoint_card
from ...inference.pipeline import PolicyPipeline
from ...modeling import registry
from ...modeling.loading import removing_stale_records
from ...modeling.policy import PolicyModel
from ...plugins import requested_plugins
from ...processing.processor import PolicyProcessor
from ..arguments import PolicyTrainingArguments
from ..checkpoints.checkpointing import STAGING_FOLDER
from ..checkpoints.folders import last_checkpoint
from ..publishing import require_card
from ..trainer import PolicyTrainer
from .build import build_policy
from .opening import Demonstrations, open_dataset
from .preflight import evaluations, pipeline_for, rehearse_evaluation, require_environments, require_writable
from .recipe import Recipe

logger = logging.get_logger(__name__)

SAVES = 20  # of a recipe's run, which keeps the last one to go on from


def run_recipe(recipe: Recipe, command: str | None = None, resume: bool = False) -> Path:
    """Train, evaluate and describe the policy of a recipe.

    Args:
        recipe: see `load_recipe`.
        command: the command line that repeats the run, shown in the card.
        resume: continue from the last Trainer checkpoint in the output folder.

    Returns:
        The output folder: config.json, model.safetensors, processor_config.json, training.json,
        evaluation.json, README.md, learning_curve.png, and rollout.mp4 if the recipe asks for it and a renderer works.

    Raises:
        OutputExistsError: the output folder holds something already.
        FolderInUseError: another run writes there.
        DiskError, InvalidRecipeError, EvaluationError, CardError: what would fail after the training.
        ResumeMismatchError: the checkpoint was written by another run.
        UnfinishedRunError: what follows the training failed; the message says how to repeat it alone.
    """
    processes, output = launched(), Path(recipe.output)
    if processes.is_main:
        checkpoint = last_checkpoint(output)
        if not resume:
            _refuse_existing(output, checkpoint)
        require_writable(output)
    processes.wait_for_main()
    checkpoint = last_checkpoint(output) if resume else None
    if resume and checkpoint is None:
        raise MissingFileError(f"{output} holds no checkpoint to resume from. Begin the run: leave out --resume.")
    arguments = _arguments(recipe)
    with locked(output, "a training") if processes.is_main else nullcontext():
        _train_and_finish(recipe, arguments, checkpoint, command)
    return output


def _train_and_finish(
    recipe: Recipe, arguments: PolicyTrainingArguments, checkpoint: str | None, command: str | None
) -> None:
    """Build, rehearse, train and finish the run of a recipe, from a checkpoint where there is one to resume from."""
    processes = launched()
    if processes.is_main and any(entry.is_to_record for entry in recipe.data.entries):
        require_environments(recipe)  # a recording may take hours
    set_seed(arguments.seed)
    config_class = registry.policy_class(recipe.policy).config_class
    robots = slot_fields(config_class, [entry.embodiment for entry in recipe.data.entries], recipe.config)
    with processes.main_first():  # which records or downloads
        if not processes.is_main:
            _require_recorded(recipe)
        # The config of a base is known once it is loaded: its horizon, its history, and what the recipe leaves as it
        # is.
        dataset = open_dataset(recipe, config_class(**recipe.config | robots) if recipe.base is None else None)
    policy, processor = build_policy(recipe, dataset)
    # What the policy does not use is not read; a base has a horizon and a history of its own.
    used = [name for name in policy.config.input_features if name in dataset.features]
    dataset = open_dataset(recipe, policy.config, [*used, ACTION])
    if processes.is_main:
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the others draw the same weights of an adapter
            rehearse_evaluation(recipe, policy, processor, dataset)
    processes.wait_for_main()

    with _naming_arguments(recipe):
        trainer = PolicyTrainer(policy, arguments, processor, train_dataset=dataset, augmentation=recipe.augmentation)
    require_card(policy, processor, _training_record(recipe, dataset, trainer, command))
    with _naming_arguments(recipe, trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    # Everything is saved before the evaluation, so that an error there loses nothing.
    finish_run(recipe, trainer, _training_record(recipe, dataset, trainer, command), command)


def _require_recorded(recipe: Recipe) -> None:
    """Check that this process sees the demonstrations that the main one has recorded, perhaps on another computer."""
    absent = [entry.dataset for entry in recipe.data.entries if entry.is_to_record]
    if absent:
        raise MissingFileError(
            f"The first process has recorded {absent[0]}, which {socket.gethostname()} does not have. Computers that "
            f"train together need a folder that all of them see: --data.dataset and --output."
        )


def _refuse_existing(output: Path, checkpoint: str | None) -> None:
    """Raise `OutputExistsError` unless the output is free; what a run left before its first checkpoint is nothing."""
    if checkpoint is not None:
        raise OutputExistsError(output, "Go on with the run that it holds: --resume.")
    if not output.is_dir() or {path.name for path in output.iterdir()} != {STAGING_FOLDER}:
        refuse_existing(output)


def finish_run(recipe: Recipe, trainer: PolicyTrainer, training: dict[str, Any], command: str | None = None) -> None:
    """Save, describe, evaluate and publish a trained policy, one step after the other.

    Of several processes the main one does so; the others return with it.

    Args:
        recipe, command: see `run_recipe`.
        trainer: whose training is over.
        training: content of training.json.

    Raises:
        UnfinishedRunError: a step failed; what was made before is kept.
    """
    processes, weights = launched(), trainer.whole_weights()  # which every process gathers
    if processes.is_main:
        _finish(recipe, trainer, training, command, weights)
    processes.wait_for_all()


def _finish(
    recipe: Recipe,
    trainer: PolicyTrainer,
    training: dict[str, Any],
    command: str | None,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    output, policy, processor = Path(recipe.output), trainer.model, trainer.processor
    folder, checkpoint, again = shlex.quote(str(output)), last_checkpoint(output), _resuming(command)
    with _step("saving it", checkpoint, again) if checkpoint is not None else nullcontext():
        save_checkpoint(output, policy, processor, training, weights)
    with _step("writing its card", output, f"manipulators card {folder}"):
        write_checkpoint_card(output)
    if section := recipe.evaluation:
        remedy = again if section.further and checkpoint else _evaluation_command(recipe)
        with _step("its evaluation", output, remedy):
            if weights is None:
                pipeline = PolicyPipeline(model=policy, processor=processor)
            else:  # no process holds the whole policy
                pipeline = PolicyPipeline.from_pretrained(output, device=trainer.args.device)
            evaluate_checkpoint(output, recipe, pipeline)
    if trainer.args.push_to_hub:
        with _step("publishing it", output, f"manipulators push {folder} {trainer.hub_model_id}"):
            trainer.publish(output)


@contextmanager
def _step(name: str, kept: str | os.PathLike, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UnfinishedRunError(name, error, kept, remedy) from error


def _resuming(command: str | None) -> str:
    """Return how a run goes on from its last checkpoint."""
    if command is None:
        return "run_recipe(recipe, resume=True)"
    return command if "--resume" in shlex.split(command) else f"{command} --resume"


def _evaluation_command(recipe: Recipe) -> str:
    """Return the command that makes the recipe's first evaluation, and adds it to the card."""
    section, folder = recipe.evaluation, str(recipe.output)
    words = ["manipulators", "eval", folder, "--env", section.environment]
    words += [word for module in requested_plugins() for word in ("--plugin", module)]
    for name in ("embodiment", "episodes", "seed", "num_envs", "horizon"):
        if getattr(section, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(section, name))]
    words += ["--video", os.path.join(folder, VIDEO_FILE)] if section.video else []
    words += ["--output", os.path.join(folder, EVALUATION_FILE)]
    return f"{shlex.join(words)}\n{shlex.join(['manipulators', 'card', folder])}"


def _training_record(
    recipe: Recipe, dataset: Demonstrations, trainer: PolicyTrainer, command: str | None
) -> dict[str, Any]:
    """Return what training.json holds."""
    arguments = trainer.args
    return {
        "recipe": asdict(recipe),
        "dataset": _dataset_record(recipe, dataset),
        "control_rate_hz": recipe.data.fps or dataset.control_rate,
        "training": {
            "steps": trainer.state.global_step,
            "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
            "learning_rate": _learning_rate(trainer),
            "seconds": round(trainer.training_seconds, 1),
            "processes": arguments.world_size,
            "hardware": _hardware(arguments.world_size),
            "losses": _last_losses(trainer.state.log_history),
            "command": command,
            "ema_decay": arguments.ema_decay,
        },
        "log_history": trainer.state.log_history,
        "versions": {
            "manipulators": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _dataset_record(recipe: Recipe, dataset: Demonstrations) -> dict[str, Any]:
    """Return what training.json holds of the demonstrations; of a mixture also of each dataset."""
    counts = {"episodes": dataset.num_episodes, "frames": dataset.num_frames, "tasks": len(dataset.tasks)}
    if not isinstance(dataset, MixtureDataset):
        return {"name": recipe.data.dataset} | counts
    parts = zip(recipe.data.entries, dataset.datasets, dataset.shares, strict=True)
    return {
        "name": recipe.data.title,
        **counts,
        "mixture": [
            {
                "name": entry.dataset,
                "episodes": part.num_episodes,
                "frames": part.num_frames,
                "tasks": len(part.tasks),
                "weight": entry.weight,
                "share": round(share, 6),
                "embodiment": entry.embodiment,
            }
            for entry, part, share in parts
        ],
    }


def _learning_rate(trainer: PolicyTrainer) -> float:
    """Return the learning rate that the schedule multiplies; a resumed optimizer has its own."""
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else [{}]
    return groups[0].get("initial_lr", trainer.args.learning_rate)


@contextmanager
def _naming_arguments(recipe: Recipe, trainer: PolicyTrainer | None = None) -> Iterator[None]:
    """Turn what an argument causes before the first step into an error of the recipe; later ones stay as they are."""
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, ManipulatorsError) and not isinstance(error, InvalidConfigError)
        if is_ours or is_lost_contact(error) or (trainer is not None and trainer.has_begun):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InvalidRecipeError(f"{recipe.name}: training: {kind}{error}") from error


def _arguments(recipe: Recipe) -> PolicyTrainingArguments:
    steps = recipe.training.get("max_steps", 0)
    saving = {"save_strategy": "steps", "save_total_limit": 1, "hub_strategy": "end"}
    saving["log_level_replica"] = "error"  # what every process would say, the main one says
    saving["save_steps"] = math.ceil(steps / SAVES) if steps > 0 else 1 / SAVES  # a share, where epochs are counted
    with _naming_arguments(recipe):
        arguments = PolicyTrainingArguments(output_dir=recipe.output, **saving | recipe.training)
    if arguments.eval_strategy != "no":
        raise InvalidRecipeError(
            f"{recipe.name}: training: eval_strategy={arguments.eval_strategy.value!r} needs an evaluation "
            f"dataset, which recipes do not have: they evaluate in closed loop after the training. In Python: "
            f"PolicyTrainer(eval_dataset=…)."
        )
    return arguments


def save_checkpoint(
    output: Path,
    policy: PolicyModel,
    processor: PolicyProcessor,
    training: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save policy, processor and training.json; every file appears complete or not at all.

    `weights` are those of a policy whose own are split among processes.
    """
    with removing_stale_records(output, written=[TRAINING_FILE]), replace_files(output) as folder:
        policy.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        processor.save_pretrained(folder)
        write_text(folder / TRAINING_FILE, json.dumps(training, indent=2) + "\n")


def evaluate_checkpoint(output: Path, recipe: Recipe, pipeline: PolicyPipeline) -> None:
    """Run the recipe's evaluations, and add the results to the checkpoint and its card."""
    from ...evaluation.rollout import evaluate

    section = recipe.evaluation
    path, further = output / EVALUATION_FILE, []
    for environment, task, robot in evaluations(recipe):
        options = {} if further else {"output": path, "video": output / VIDEO_FILE if section.video else None}
        common = {"num_envs": section.num_envs, "horizon": section.horizon, "task": task}
        own = pipeline_for(pipeline, robot)
        further.append(evaluate(own, environment, section.seeds, **common, **options).to_dict())
    result = further.pop(0)
    result |= {"checkpoint": str(output), "commit": None}  # the policy may remember the base it was loaded from
    if further:
        result["further"] = further
    write_text(path, json.dumps(result, indent=2) + "\n")
    write_checkpoint_card(output)


def _last_losses(log_history: list[dict[str, Any]]) -> dict[str, float]:
    logged = [entry for entry in log_history if "loss" in entry]
    others = ("grad_norm", "learning_rate", "epoch", "step", "data_wait")
    return {name: value for name, value in logged[-1].items() if name not in others} if logged else {}


def _hardware(processes: int) -> str:
    if torch.cuda.is_available():
        return f"{processes if processes > 1 else torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads{each}"


def command_line(arguments: list[str]) -> str:
    """Return the command line that was given, quoted for a shell."""
    return shlex.join(["manipulators", *arguments])
