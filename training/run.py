"""Run a recipe: demonstrations in, a trained, measured and described policy out."""

from __future__ import annotations

import json
import platform
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .._files import refuse_existing, replace_files, write_text
from .._version import __version__
from ..configuration.features import ACTION
from ..data.dataset import LeRobotDataset
from ..errors import InvalidRecipeError, MissingFileError
from ..hub_cards.checkpoint_card import EVALUATION_FILE, TRAINING_FILE, VIDEO_FILE, write_checkpoint_card
from ..inference.pipeline import PolicyPipeline
from ..modeling import registry
from ..modeling.loading import removing_stale_records
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from .arguments import PolicyTrainingArguments
from .build import build_policy, open_dataset
from .recipe import Recipe
from .trainer import PolicyTrainer

logger = logging.get_logger(__name__)


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
    """
    output = Path(recipe.output)
    if not resume:
        refuse_existing(output)
    elif not output.is_dir() or get_last_checkpoint(output) is None:
        raise MissingFileError(
            f"{output} holds no checkpoint-<step> folder to resume from. A run writes them with "
            f"--training.save_strategy steps --training.save_steps 500."
        )
    arguments = _arguments(recipe)
    set_seed(arguments.seed)
    config_class = registry.policy_class(recipe.policy).config_class
    # The config of a base is known once it is loaded: its horizon, its history, and what the recipe leaves as it is.
    dataset = open_dataset(recipe, config_class(**recipe.config) if recipe.base is None else None)
    policy, processor = build_policy(recipe, dataset)
    # What the policy does not use is not read; a base has a horizon and a history of its own.
    used = [name for name in policy.config.input_features if name in dataset.features]
    dataset = open_dataset(recipe, policy.config, [*used, ACTION])

    trainer = PolicyTrainer(policy, arguments, processor, train_dataset=dataset, augmentation=recipe.augmentation)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = time.perf_counter() - began
    training = _training_record(recipe, dataset, trainer, seconds, command)
    # Saved before the evaluation, so that an error there does not lose the trained policy.
    save_checkpoint(output, policy, processor, training)
    if recipe.evaluation is not None:
        evaluate_checkpoint(output, recipe, PolicyPipeline(model=policy, processor=processor))
    if arguments.push_to_hub:
        trainer.publish(output)
    return output


def _training_record(
    recipe: Recipe, dataset: LeRobotDataset, trainer: PolicyTrainer, seconds: float, command: str | None
) -> dict[str, Any]:
    """Return what training.json holds."""
    arguments = trainer.args
    return {
        "recipe": asdict(recipe),
        "dataset": {
            "name": recipe.data.dataset,
            "episodes": dataset.num_episodes,
            "frames": dataset.num_frames,
            "tasks": len(dataset.tasks),
        },
        "control_rate_hz": dataset.fps,
        "training": {
            "steps": trainer.state.global_step,
            "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
            "learning_rate": arguments.learning_rate,
            "seconds": round(seconds, 1),
            "hardware": _hardware(),
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


def _arguments(recipe: Recipe) -> PolicyTrainingArguments:
    try:
        arguments = PolicyTrainingArguments(output_dir=recipe.output, **recipe.training)
    except ValueError as error:
        raise InvalidRecipeError(f"{recipe.name}: training: {error}") from error
    if arguments.eval_strategy != "no":
        raise InvalidRecipeError(
            f"{recipe.name}: training: eval_strategy={arguments.eval_strategy.value!r} needs an evaluation "
            f"dataset, which recipes do not have: they evaluate in closed loop after the training. In Python: "
            f"PolicyTrainer(eval_dataset=…)."
        )
    return arguments


def save_checkpoint(output: Path, policy: PolicyModel, processor: PolicyProcessor, training: dict[str, Any]) -> None:
    """Save policy, processor, training.json and a card; every file appears complete or not at all."""
    with removing_stale_records(output, written=[TRAINING_FILE]), replace_files(output) as folder:
        policy.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_text(folder / TRAINING_FILE, json.dumps(training, indent=2) + "\n")
    write_checkpoint_card(output)


def evaluate_checkpoint(output: Path, recipe: Recipe, pipeline: PolicyPipeline) -> None:
    """Run the recipe's evaluation, and add the result to the checkpoint and its card."""
    from ..evaluation.rollout import evaluate

    section = recipe.evaluation
    common = {"num_envs": section.num_envs, "horizon": section.horizon}
    video = output / VIDEO_FILE if section.video else None
    path = output / EVALUATION_FILE
    result = evaluate(pipeline, section.environment, section.seeds, video=video, output=path, **common).to_dict()
    result |= {"checkpoint": str(output), "commit": None}  # the policy may remember the base it was loaded from
    if section.further:
        further = [(other.environment or section.environment, other.task) for other in section.further]
        result["further"] = [
            evaluate(pipeline, environment, section.seeds, task=task, **common).to_dict()
            for environment, task in further
        ]
    write_text(path, json.dumps(result, indent=2) + "\n")
    write_checkpoint_card(output)


def _last_losses(log_history: list[dict[str, Any]]) -> dict[str, float]:
    logged = [entry for entry in log_history if "loss" in entry]
    others = ("grad_norm", "learning_rate", "epoch", "step", "data_wait")
    return {name: value for name, value in logged[-1].items() if name not in others} if logged else {}


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def command_line(arguments: list[str]) -> str:
    """Return the command line that was given, quoted for a shell."""
    return shlex.join(["manipulators", *arguments])
