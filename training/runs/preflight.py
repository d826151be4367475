"""What could fail after a training is tried before its first step: the output, the environments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..._disk import naming_disk_errors
from ...errors import InvalidRecipeError
from ...inference.pipeline import PolicyPipeline
from ...modeling.policy import PolicyModel
from ...processing.processor import PolicyProcessor
from .opening import Demonstrations
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
    from ...evaluation.environments import describe_environment

    for environment, _, _ in evaluations(recipe):
        describe_environment(environment, recipe.evaluation.horizon)


def rehearse_evaluation(
    recipe: Recipe, policy: PolicyModel, processor: PolicyProcessor, dataset: Demonstrations
) -> None:
    """Take one step of every evaluation with the policy as it is before its training.

    Raises:
        InvalidRecipeError: an environment's rate, observations or actions are not those of the policy, or it fails.
    """
    from ...evaluation.environments import describe_environment
    from ...evaluation.rollout import evaluate

    pipeline = PolicyPipeline(model=policy, processor=processor, device=policy.device)
    section = recipe.evaluation
    for environment, task, robot in evaluations(recipe):
        rate = describe_environment(environment, section.horizon).fps
        taught = recipe.data.fps or dataset.control_rate
        if rate != taught:
            raise InvalidRecipeError(
                f"{environment} takes {rate} actions per second, and the demonstrations in {recipe.data.title} were "
                f"recorded at {taught:g}: a policy of one moves differently at the other. Name an environment of "
                f"that rate, or train without: --evaluation null"
            )
        own = pipeline_for(pipeline, robot)
        try:
            evaluate(own, environment, section.seeds[:1], num_envs=1, horizon=1, progress=False, task=task)
        except Exception as error:
            raise InvalidRecipeError(
                f"The policy cannot be evaluated in {environment}, so it is not trained: its first step there fails. "
                f"{type(error).__name__}: {error}\nName an environment that fits, or train without: --evaluation null"
            ) from error


def evaluations(recipe: Recipe) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield environment, instruction and robot of each evaluation of a recipe, the first one first."""
    section = recipe.evaluation
    if section is None:
        return
    yield section.environment, None, section.embodiment
    for other in section.further or ():
        yield other.environment or section.environment, other.task, other.embodiment or section.embodiment


def pipeline_for(pipeline: PolicyPipeline, robot: str | None) -> PolicyPipeline:
    """Return a pipeline of the same policy for one of the robots that it has learned from.

    Raises:
        InvalidRecipeError: there are several and none is named, or one that the policy does not know.
    """
    processor = pipeline.processor
    known = list(processor.embodiments or [processor.embodiment])
    if robot is None and (processor.embodiment is not None or not processor.embodiments):
        return pipeline
    if robot not in known:
        problem = f"there is no robot {robot!r}" if robot else "the policy learns from several robots"
        raise InvalidRecipeError(
            f"evaluation.embodiment={robot}: {problem}. Name one of: {', '.join(map(str, known))}."
        )
    own = processor.for_embodiment(robot) if processor.embodiments else processor
    return PolicyPipeline(model=pipeline.policy, processor=own, device=pipeline.device, embodiment=robot)
