"""The command line that repeats an evaluation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..configuration.contract import OBSERVATION_LIMIT
from .wording import one_line

# Configs' names of the steps of a prediction, and what stands for None there.
_SAMPLING_STEPS = {"num_inference_steps": "num_train_timesteps", "num_inference_timesteps": None}


def evaluation_command(
    evaluation: Mapping[str, Any], source: str, config: Mapping[str, Any], reads_instruction: bool
) -> str:
    """Return the command that repeats an evaluation of a checkpoint.

    Args:
        evaluation: content of evaluation.json.
        source: folder or Hub id of the checkpoint.
        config: its config.json, for what the evaluation changed.
        reads_instruction: whether the policy does; otherwise the instruction makes no difference.
    """
    words = ["manipulators", "eval", source, "--env", one_line(evaluation["environment"])]
    words += [word for module in evaluation.get("plugins") or () for word in ("--plugin", module)]
    words += _seeds(evaluation["seeds"])
    for name in ("num_envs", "horizon", "device", "tokenizer", "embodiment"):
        if evaluation.get(name):
            words += [f"--{name.replace('_', '-')}", one_line(evaluation[name])]
    if evaluation.get("dtype") and evaluation["dtype"] != (config.get("dtype") or "float32"):
        words += ["--dtype", evaluation["dtype"]]
    if evaluation.get("camera_map"):
        words += ["--camera-map", *(f"{yours}={theirs}" for yours, theirs in evaluation["camera_map"].items())]
    if evaluation.get("clamp_actions"):
        words.append("--clamp-actions")
    if (steps := evaluation.get("max_action_step")) is not None:
        words += ["--max-action-step", *_steps(steps)]
    if evaluation.get("observation_limit", OBSERVATION_LIMIT) != OBSERVATION_LIMIT:
        words += ["--observation-limit", str(evaluation["observation_limit"] or "inf")]
    if reads_instruction and evaluation.get("task"):
        words += ["--task", evaluation["task"]]
    for name, value in _changed(evaluation, config).items():
        words += [f"--config.{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _seeds(seeds: Sequence[int]) -> list[str]:
    first = seeds[0]
    if list(seeds) == list(range(first, first + len(seeds))):
        return ["--episodes", str(len(seeds)), "--seed", str(first)]
    return ["--seeds", *map(str, seeds)]


def _steps(steps: float | Sequence[float] | Mapping[str, float]) -> list[str]:
    if isinstance(steps, Mapping):
        return [f"{name}={step}" for name, step in steps.items()]
    return [str(step) for step in (steps if isinstance(steps, Sequence) else [steps])]


def _changed(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the evaluation was made with and that the saved config has otherwise."""
    used = dict(evaluation.get("overrides") or {})
    if evaluation.get("n_action_steps") is not None:
        used["n_action_steps"] = evaluation["n_action_steps"]
        if "temporal_ensemble_coeff" in config:
            used["temporal_ensemble_coeff"] = evaluation.get("temporal_ensemble_coeff")
    for name, instead in _SAMPLING_STEPS.items():
        if name in config and evaluation.get("sampling_steps") not in (None, config[name] or config.get(instead)):
            used[name] = evaluation["sampling_steps"]
    return {name: value for name, value in used.items() if name not in config or config[name] != value}
