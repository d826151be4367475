"""What could fail after a training is tried before its first step: the output, the environments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .._disk import naming_disk_errors
from ..data.dataset import LeRobotDataset
from ..errors import InvalidRecipeError
from ..inference.pipeline import PolicyPipeline
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from .recipe import Recipe


def require_writable(folder: str | os.PathLike) -> None:
    """Check that a folder, which need not exist, can be made and written to.

    Raises:
        DiskError: it cannot.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with naming_disk_errors(folder), tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"0")
        file.flush()


def require_environments(recipe: Recipe) -> None:
    """Check that every environment of the recipe's evaluation can be made; its simulator and renderer are used.

    Raises:
        EvaluationError: one cannot.
    """
    from ..evaluation.environments import describe_environment

    for environment, _ in evaluations(recipe):
        describe_environment(environment, recipe.evaluation.horizon)


def rehearse_evaluation(
    recipe: Recipe, policy: PolicyModel, processor: PolicyProcessor, dataset: LeRobotDataset
) -> None:
    """Take one step of every evaluation with the policy as it is before its training.

    Raises:
        InvalidRecipeError: an environment's rate, observations or actions are not those of the policy, or it fails.
    """
    from ..evaluation.environments import describe_environment
    from ..evaluation.rollout import evaluate

    pipeline = PolicyPipeline(model=policy, processor=processor, device=policy.device)
    section = recipe.evaluation
    for environment, task in evaluations(recipe):
        rate = describe_environment(environment, section.horizon).fps
        if rate != dataset.fps:
            raise InvalidRecipeError(
                f"{environment} takes {rate} actions per second, and the demonstrations in {recipe.data.dataset} were "
                f"recorded at {dataset.fps:g}: a policy of one moves differently at the other. Name an environment of "
                f"that rate, or train without: --evaluation null"
            )
        try:
            evaluate(pipeline, environment, section.seeds[:1], num_envs=1, horizon=1, progress=False, task=task)
        except Exception as error:
            raise InvalidRecipeError(
                f"The policy cannot be evaluated in {environment}, so it is not trained: its first step there fails. "
                f"{type(error).__name__}: {error}\nName an environment that fits, or train without: --evaluation null"
            ) from error


def evaluations(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Yield environment and instruction of each evaluation of a recipe, the first one first."""
    section = recipe.evaluation
    if section is None:
        return
    yield section.environment, None
    for other in section.further or ():
        yield other.environment or section.environment, other.task
