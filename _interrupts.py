"""What an interrupted command keeps, and the command that goes on."""

from __future__ import annotations

import argparse
from pathlib import Path


def kept_by_any(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted command keeps, and the command that goes on: the same.

    Args:
        options: of the command, with its `arguments`.
        note: what the interrupt itself says is kept; empty for nothing.
    """
    if note:
        return f"{note} To go on:", options.arguments
    return "Nothing was finished. To begin again:", options.arguments


def kept_by_evaluation(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted evaluation keeps, and the command that goes on."""
    if options.output is None:
        return "No episode is kept without --output FILE. To begin again:", options.arguments
    return kept_by_any(options, note)


def kept_by_training(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted training keeps, and the command that goes on."""
    recipe = options.loaded
    folder = None if recipe is None else Path(recipe.output)
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return kept_by_any(options, note)
    from transformers.trainer_utils import get_last_checkpoint

    from .checkpoint import CONFIG_FILE

    checkpoint, is_trained = get_last_checkpoint(folder), (folder / CONFIG_FILE).is_file()
    if is_trained:
        note = f"The trained policy is in {folder}. {note}".strip()
    if checkpoint is not None:
        resumed = options.arguments if options.resume else [*options.arguments, "--resume"]
        return f"{note if is_trained else f'{checkpoint} is kept.'} To go on:", resumed
    if is_trained and recipe.evaluation is not None:
        section = recipe.evaluation
        words = ["eval", folder, "--env", section.environment, "--episodes", section.episodes, "--seed", section.seed]
        words += ["--num-envs", section.num_envs, "--output", folder / "evaluation.json"]
        words += [] if section.horizon is None else ["--horizon", section.horizon]
        return f"{note} To evaluate it:", [str(word) for word in words]
    return (
        f"No checkpoint was written; --training.save_strategy steps --training.save_steps 500 writes some. To begin "
        f"again, rm -r {folder} and:",
        options.arguments,
    )
