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
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .._files import refuse_existing, replace_files, write_text
from .._version import __version__
from ..auto import AutoPolicy
from ..configuration.features import ACTION, ENVIRONMENT_STATE, STATE, FeatureType, PolicyFeature
from ..configuration.policy import PolicyConfig
from ..data.dataset import LeRobotDataset
from ..errors import InvalidRecipeError, MissingFileError, nearest
from ..hub_cards.checkpoint_card import EVALUATION_FILE, TRAINING_FILE, VIDEO_FILE, write_checkpoint_card
from ..inference.pipeline import PolicyPipeline
from ..modeling import registry
from ..modeling.policy import PolicyModel
from ..processing.imagenet import IMAGENET_STATISTICS
from ..processing.processor import PolicyProcessor
from ..processing.registry import processor_class
from ..processing.relative_actions import match_dimensions
from ..processing.word_tokenizer import word_tokenizer
from .arguments import PolicyTrainingArguments
from .recipe import Recipe
from .relative_statistics import relative_action_statistics
from .trainer import PolicyTrainer

logger = logging.get_logger(__name__)


def run_recipe(recipe: Recipe, command: str | None = None, resume: bool = False) -> Path:
    """Train, evaluate and describe the policy of a recipe.

    Args:
        recipe: see `load_recipe`.
        command: the command line that repeats the run, for the card.
        resume: go on from the last Trainer checkpoint in the output folder.

    Returns:
        The output folder: config.json, model.safetensors, processor_config.json, training.json,
        evaluation.json, README.md, learning_curve.png, and rollout.mp4 where it was asked for and something draws.

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
    dataset = open_dataset(recipe, config_class(**recipe.config))
    policy, processor = build_policy(recipe, dataset)

    trainer = PolicyTrainer(policy, arguments, processor, train_dataset=dataset, augmentation=recipe.augmentation)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    training = {
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
            "seconds": round(time.perf_counter() - began, 1),
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
    # Saved before it is evaluated: whatever happens there, the trained policy is not lost.
    save_checkpoint(output, policy, processor, training)
    if recipe.evaluation is not None:
        evaluate_checkpoint(output, recipe, PolicyPipeline(model=policy, processor=processor))
    return output


def _arguments(recipe: Recipe) -> PolicyTrainingArguments:
    try:
        arguments = PolicyTrainingArguments(output_dir=recipe.output, **recipe.training)
    except ValueError as error:
        raise InvalidRecipeError(f"{recipe.name}: training: {error}") from error
    if arguments.eval_strategy != "no":
        raise InvalidRecipeError(
            f"{recipe.name}: training: eval_strategy={arguments.eval_strategy.value!r} needs a second dataset, which "
            f"a recipe has not; it is evaluated in closed loop at its end. In Python: PolicyTrainer(eval_dataset=…)."
        )
    return arguments


def _relative_to(recipe: Recipe, dataset: LeRobotDataset) -> list[int | None]:
    if recipe.relative_actions is not True:
        return list(recipe.relative_actions)
    if STATE not in dataset.features:
        raise InvalidRecipeError(f"relative_actions need {STATE!r} among the inputs; they are {recipe.inputs}.")
    widths = tuple(dataset.features[name]["shape"][0] for name in (ACTION, STATE))
    return match_dimensions(dataset.dimension_names[ACTION], dataset.dimension_names[STATE], widths)


def _tokenizer(recipe: Recipe, dataset: LeRobotDataset) -> PreTrainedTokenizerBase | str | None:
    return word_tokenizer(dataset.tasks) if recipe.tokenizer == "words" else recipe.tokenizer


def open_dataset(recipe: Recipe, config: PolicyConfig, features: list[str] | None = None) -> LeRobotDataset:
    """Open the recipe's demonstrations, recorded first when they do not exist and the recipe says how."""
    if features is None and recipe.inputs is not None:
        features = [*recipe.inputs, ACTION]
    record = recipe.data.record
    if record is not None and not Path(recipe.data.dataset).exists():
        from ..evaluation.demonstrations import record_demonstrations

        record_demonstrations(record.environment, record.episodes, recipe.data.dataset, seed=record.seed)
    dataset = LeRobotDataset(
        recipe.data.dataset,
        action_horizon=config.action_horizon,
        n_obs_steps=config.n_obs_steps,
        features=features,
        episodes=recipe.data.episodes,
        drop_n_last_frames=config.frames_without_start,
    )
    if record is not None and recipe.data.episodes is None and dataset.num_episodes != record.total_episodes:
        raise InvalidRecipeError(
            f"{recipe.data.dataset} exists and holds {dataset.num_episodes} episodes; the recipe records "
            f"{record.total_episodes}. Choose another folder, --data.dataset with --data.record.episodes, or remove "
            f"it."
        )
    return dataset


def build_policy(recipe: Recipe, dataset: LeRobotDataset) -> tuple[PolicyModel, PolicyProcessor]:
    """Build a policy, fresh or from the recipe's base, and its processor for a dataset's features and statistics."""
    inputs, outputs = policy_features(dataset)
    if not inputs or not outputs:
        raise InvalidRecipeError(
            f"{recipe.data.dataset} gives the inputs {list(inputs)} and the outputs {list(outputs)}; a policy needs "
            f"both. The dataset has: {', '.join(dataset.features)}."
        )
    # The robot is the dataset's, and no camera is ever missing: what a base says of its own means nothing here.
    config_class = registry.policy_class(recipe.policy).config_class
    fields = {name: config_class.__dataclass_fields__[name].default for name in config_class.robot_fields}
    fields |= recipe.config | {"input_features": inputs, "output_features": outputs}
    if recipe.base is None:
        if recipe.dtype is not None:
            raise InvalidRecipeError(f"dtype={recipe.dtype} is that of a base; fresh weights are trained in float32.")
        policy = AutoPolicy.from_config(config_class(**fields))
    else:
        policy = AutoPolicy.from_pretrained(recipe.base, **fields, **({"dtype": recipe.dtype} if recipe.dtype else {}))
        if policy.config.model_type != recipe.policy:
            raise InvalidRecipeError(
                f"{recipe.base} is a {policy.config.model_type}; the recipe is for {recipe.policy}."
            )
    config = policy.config
    used = (*inputs, *outputs)
    statistics = dict(dataset.statistics)
    if getattr(config, "pretrained_backbone_weights", None):
        # A pretrained backbone wants the pixels it was pretrained on, not those of a few scenes.
        statistics |= {name: statistics[name] | IMAGENET_STATISTICS for name in config.image_features}
    relative_to = None
    if recipe.relative_actions is not False:
        relative_to = _relative_to(recipe, dataset)
        plain = open_dataset(recipe, config, features=[STATE, ACTION])  # no cameras: nothing is decoded
        statistics[ACTION] = relative_action_statistics(plain, relative_to)
    language = {"tokenizer": _tokenizer(recipe, dataset)} if config.reads_instruction else {}
    processor = processor_class(config).from_config(
        config,
        statistics,
        **language,
        relative_to=relative_to,
        dimension_names={name: dataset.dimension_names[name] for name in used},
        units={name: dataset.units[name] for name in used},
    )
    return policy, processor


def policy_features(dataset: LeRobotDataset) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """Return the input and output features that a dataset's columns are for a policy."""
    inputs, outputs = {}, {}
    for name, column in dataset.features.items():
        shape = tuple(column["shape"])
        if name in dataset.camera_names:
            height, width, channels = shape
            inputs[name] = PolicyFeature(FeatureType.VISUAL, (channels, height, width))
        elif name == STATE:
            inputs[name] = PolicyFeature(FeatureType.STATE, shape)
        elif name == ENVIRONMENT_STATE:
            inputs[name] = PolicyFeature(FeatureType.ENV, shape)
        elif name == ACTION:
            outputs[name] = PolicyFeature(FeatureType.ACTION, shape)
        elif name.startswith("observation."):
            known = (STATE, ENVIRONMENT_STATE, "observation.images.<camera>")
            raise InvalidRecipeError(
                f"The dataset's feature {name!r} is none that policies read. {nearest(name, known)} "
                f"Leave it out with inputs: [...]."
            )
    return inputs, outputs


def save_checkpoint(output: Path, policy: PolicyModel, processor: PolicyProcessor, training: dict[str, Any]) -> None:
    """Save policy, processor, the record of the training and a card; every file appears whole or not at all."""
    with replace_files(output) as folder:
        policy.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_text(folder / TRAINING_FILE, json.dumps(training, indent=2) + "\n")
    write_checkpoint_card(output)


def evaluate_checkpoint(output: Path, recipe: Recipe, pipeline: PolicyPipeline) -> None:
    """Run the recipe's evaluation, and put the result into the checkpoint and its card."""
    from ..evaluation.rollout import evaluate

    section = recipe.evaluation
    common = {"num_envs": section.num_envs, "horizon": section.horizon}
    video = output / VIDEO_FILE if section.video else None
    result = evaluate(pipeline, section.environment, section.seeds, video=video, **common).to_dict()
    if section.further:
        further = [(other.environment or section.environment, other.task) for other in section.further]
        result["further"] = [
            evaluate(pipeline, environment, section.seeds, task=task, **common).to_dict()
            for environment, task in further
        ]
    write_text(output / EVALUATION_FILE, json.dumps(result, indent=2) + "\n")
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
