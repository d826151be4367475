"""The sentences and table rows of a card that follow from its values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..configuration.contract import OBSERVATION_LIMIT, ContractEntry, Dimension
from . import wording
from .card_data import CardData, EvaluationSummary


def title(card: CardData) -> str:
    """Return the headline: the policy and what it is for."""
    name = wording.escaped(card.policy_name)
    if card.evaluation:
        return f"{name} policy for {wording.escaped(card.evaluation.environment)}"
    if card.dataset:
        datasets = ", ".join(wording.escaped(wording.public_name(dataset)) for dataset in card.dataset.names)
        return f"{name} policy trained on {datasets}"
    return f"{name} policy"


def result(card: CardData) -> str:
    """Return the one line that says how well the policy does."""
    evaluation = card.evaluation
    if not evaluation:
        return "This policy has not been evaluated."
    where = "in simulation" if evaluation.simulated else "on the real robot"
    interval = f", 95 % interval {_interval(evaluation)}" if evaluation.interval else ""
    return (
        f"Solves {evaluation.solved} of {evaluation.episodes} episodes of "
        f"{wording.code(evaluation.environment)} {where} "
        f"(success rate {wording.percent(evaluation.success_rate)} %{interval})."
    )


def timing(card: CardData) -> str:
    """Return how many actions are predicted and executed at once, and how often; empty when unknown."""
    sentences = []
    if card.action_horizon and card.n_action_steps:
        executed = {
            1: "executes the first one before it looks again",
            card.action_horizon: "executes all of them before it looks again",
        }.get(card.n_action_steps, f"executes the first {card.n_action_steps} before it looks again")
        if card.n_obs_steps > 1:
            executed = f"executes {card.n_action_steps} of them, from the current step on, before it looks again"
        actions = "one action" if card.action_horizon == 1 else f"{card.action_horizon} actions"
        sentences.append(
            f"The policy predicts {actions} at a time (`action_horizon`)"
            + (f" and {executed} (`n_action_steps`)." if card.action_horizon > 1 else ".")
        )
    if card.n_obs_steps > 1:
        sentences.append(f"It looks at the last {card.n_obs_steps} observations, which the pipeline keeps.")
    if card.control_rate_hz:
        rate = wording.number(card.control_rate_hz)
        sentences.append(f"Actions follow each other at {rate} Hz, the rate of the demonstrations.")
    return " ".join(sentences)


def eval_command(card: CardData) -> str:
    """Return the command line that evaluates the policy in the environment it was evaluated in."""
    if not card.evaluation:
        return ""
    words = ["manipulators", "eval", card.repo_id or wording.PLACEHOLDER]
    words += ["--env", wording.one_line(card.evaluation.environment)]
    if card.evaluation.embodiment:
        words += ["--embodiment", wording.one_line(card.evaluation.embodiment)]
    if card.instruction and card.evaluation.task:
        words += ["--task", wording.one_line(card.evaluation.task)]
    return shlex.join(words)


def training_rows(card: CardData) -> list[tuple[str, str]]:
    """Return the rows of the training table; empty when nothing is known."""
    run = card.training
    if not run:
        return []
    rows = []
    if run.steps is not None:
        rows.append(("Steps", wording.count(run.steps)))
    if run.batch_size is not None:
        split = f", in {run.processes} processes" if run.processes and run.processes > 1 else ""
        rows.append(("Batch size", f"{wording.count(run.batch_size)}{split}"))
    if run.learning_rate is not None:
        rows.append(("Learning rate", wording.rates(run.learning_rate)))
    if run.ema_decay is not None:
        rows.append(("Weights", f"Exponential moving average over the steps, decay up to {run.ema_decay}"))
    if run.seconds is not None:
        rows.append(("Time", wording.duration(run.seconds)))
    if run.hardware:
        rows.append(("Hardware", run.hardware))
    rows += [(f"Last {wording.cell(name)}", wording.number(value)) for name, value in run.losses.items()]
    return rows


def evaluation_rows(card: CardData) -> list[tuple[str, str]]:
    """Return the rows of the evaluation table; empty without an evaluation."""
    evaluation = card.evaluation
    if not evaluation:
        return []
    rate = wording.percent(evaluation.success_rate)
    rows = [
        ("Environment", wording.one_line(evaluation.environment)),
        ("Success rate", f"{rate} % ({evaluation.solved} of {evaluation.episodes} episodes)"),
    ]
    if evaluation.requested_episodes and evaluation.requested_episodes > evaluation.episodes:
        asked = wording.count(evaluation.requested_episodes)
        rows.append(("Stopped early", f"after {wording.count(evaluation.episodes)} of {asked} episodes"))
    if evaluation.errors:
        rows.append(("Ended in an error of the environment", f"{_episodes(evaluation.errors)}, counted as failed"))
    if evaluation.embodiment:
        rows.insert(1, ("Robot", wording.one_line(evaluation.embodiment)))
    if card.instruction and evaluation.task:
        rows.insert(1, ("Instruction", wording.one_line(evaluation.task)))
    if evaluation.interval:
        rows.append(("95 % interval", _interval(evaluation)))
    if evaluation.seeds is not None and len(evaluation.seeds):
        rows.append(("Seeds", wording.seed_runs(evaluation.seeds)))
    if wording.is_number(evaluation.mean_length):
        rows.append(("Mean length", f"{wording.number(evaluation.mean_length)} steps"))
    if wording.is_number(evaluation.mean_return):
        rows.append(("Mean return", wording.number(evaluation.mean_return)))
    if wording.is_number(evaluation.milliseconds_per_action):
        served = f" for {evaluation.num_envs} environments at once" if evaluation.num_envs > 1 else ""
        rows.append(("Time per action", f"{wording.number(evaluation.milliseconds_per_action)} ms{served}"))
    if wording.is_number(evaluation.clipped_fraction):
        rows.append(("Actions clipped to the action space", f"{wording.percent(evaluation.clipped_fraction)} %"))
    if evaluation.n_action_steps:
        rows.append(("Actions executed of each prediction", wording.count(evaluation.n_action_steps)))
    if evaluation.sampling_steps:
        rows.append(("Sampling steps", wording.count(evaluation.sampling_steps)))
    if evaluation.dtype and evaluation.device:
        rows.append(("Numbers", f"{evaluation.dtype} on {evaluation.device}"))
    return rows


def _episodes(count: int) -> str:
    return f"{wording.count(count)} episode{'s' if count != 1 else ''}"


def further_rows(card: CardData) -> list[tuple[str, str, str, str]]:
    """Return environment, instruction, success and interval of each evaluation beside the first, itself included."""
    if not card.evaluation or not card.evaluation.further:
        return []
    return [
        (
            wording.one_line(each.environment)
            + (f", robot {wording.one_line(each.embodiment)}" if each.embodiment else ""),
            wording.one_line(each.task) if card.instruction and each.task else "",
            f"{each.solved} of {each.episodes}" + (f", {each.errors} ended in an error" if each.errors else ""),
            _interval(each) if each.interval else "",
        )
        for each in (card.evaluation, *card.evaluation.further)
    ]


def measured(card: CardData) -> str:
    """Return how the evaluation was made; empty without one."""
    if not card.evaluation:
        return ""
    sentences = [
        "Measured in closed loop: the policy sees, acts and sees what came of it, one episode after another; "
        "the environment reports success."
    ]
    if card.evaluation.horizon is not None:
        sentences.append(f"An episode not solved within {card.evaluation.horizon} steps counts as failed.")
    if card.evaluation.milliseconds_per_action is not None:
        sentences.append(
            "The time per action is the mean over all control steps, those between two predictions included."
        )
    return " ".join(sentences)


def video(card: CardData) -> str:
    """Return the address of the rollout video, in full where it is known; empty without one."""
    name = card.evaluation.video if card.evaluation else None
    if not name or not card.repo_id:
        return name or ""
    return f"https://huggingface.co/{card.repo_id}/resolve/main/{name}"


def limits(card: CardData) -> list[str]:
    """Return what a user must not expect, beside the card's own `limits`."""
    vectors = [entry for entry in (*card.inputs, *card.outputs) if not entry.is_camera]
    sentences = []
    if not card.evaluation:
        sentences.append(
            "It has not been evaluated. Try it in simulation, or slowly and with a hand on the emergency "
            "stop, before you rely on it."
        )
    elif card.evaluation.simulated:
        sentences.append("It was evaluated in simulation only: nothing is known about how it does on a real robot.")
    if card.dataset and card.dataset.episodes is not None:
        sentences.append(
            f"It was trained on {wording.count(card.dataset.episodes)} "
            f"demonstration{'s' if card.dataset.episodes != 1 else ''}{_of_tasks(card.dataset.tasks)}. "
            f"Expect it to fail with other tasks, objects, robots, places or viewpoints."
        )
    sentences += _range_limits(card.outputs) + _observation_limits(card.inputs)
    without_units = [wording.code(e.name) for e in vectors if not any(d.unit for d in e.dimensions)]
    if without_units:
        sentences.append(
            f"Units were not recorded for {', '.join(without_units)}: compare your robot's values with the "
            f"training data before you connect it."
        )
    if card.control_rate_hz:
        rate = wording.number(card.control_rate_hz)
        sentences.append(f"It was trained at {rate} Hz: at another rate, the same actions move a robot differently.")
    return [*sentences, *map(wording.one_line, card.limits)]


def _range_limits(outputs: Sequence[ContractEntry]) -> list[str]:
    """Return what the recorded ranges say about the actions that the robot gets, and how to keep them in bounds."""
    dimensions = [dimension for entry in outputs for dimension in entry.dimensions]
    step = f"`max_action_step={_example_step(dimensions)}` limits how far an action may be from the one before"
    if any(entry.absolute_range is None for entry in outputs):
        return [
            "The range of its training actions was not recorded: limit speed and workspace on the robot. "
            f"`PolicyPipeline.from_pretrained(source, …)` with {step}, in the action's units."
        ]
    relative = [dimension for dimension in dimensions if dimension.relative_to]
    sentences = []
    if len(relative) < len(dimensions):
        which = "absolute actions" if relative else "actions"
        sentences.append(
            f"It has learned {which} inside the training ranges above; `pipeline.outside_training_range` says how "
            f"many were predicted beyond them. They are not the safety limits of your robot: keep those on."
        )
    if relative:
        sentences.append(
            "Actions that are predicted as differences have no recorded range in the robot's own units: the ranges "
            "above are those of the differences, which `pipeline.outside_training_range` compares. Limit speed and "
            "workspace on the robot."
        )
    sentences.append(
        f"`PolicyPipeline.from_pretrained(source, …)` with `clamp_actions=True` keeps "
        f"{'actions and differences' if relative else 'actions'} inside these ranges; {step}, in the action's units."
    )
    return sentences


def _observation_limits(inputs: Sequence[ContractEntry]) -> list[str]:
    """Return what happens to observations unlike those of training."""
    if not inputs:
        return []
    return [
        f"`print(pipeline.observation_report)` names states outside their training range and cameras that are dark, "
        f"frozen or swap red and blue; a state that lies more than {OBSERVATION_LIMIT:g} training ranges outside is "
        f"refused, as with mm for m."
    ]


def _example_step(dimensions: Sequence[Dimension]) -> str:
    name = next((dimension.name for dimension in dimensions if dimension.name), None)
    return "0.05" if name is None else f"{{{wording.one_line(name)!r}: 0.05}}"


def _interval(evaluation: EvaluationSummary) -> str:
    low, high = evaluation.interval
    return f"{wording.percent(low)}–{wording.percent(high)} %"


def _of_tasks(tasks: int | None) -> str:
    if tasks is None:
        return ""
    return " of one task" if tasks == 1 else f" of {wording.count(tasks)} tasks"
