"""How fast a policy answers: a whole chunk, and the stages it consists of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from .._display import Displayed
from ..errors import InvalidEvaluationError
from ..modeling.stages import observed_stages
from .pipeline import PolicyPipeline
from .plausibility import training_colours, training_range

INSTRUCTION = "pick up the object and put it down"


@dataclass(frozen=True, repr=False)
class Speed(Displayed):
    """The seconds that chunks and their stages took, round by round.

    Args:
        policy (`str`): its model type.
        device, dtype (`str`): where it ran, and the type of its weights.
        batch_size (`int`): observations per chunk.
        n_action_steps (`int`): actions of a chunk that a robot executes before it asks again.
        chunk (`list[float]`): from an observation to actions in robot units, undisturbed [s].
        stages (`dict[str, list[list[float]]]`): per stage and round the seconds of each of its calls; measured apart
            from `chunk`, because the device is waited for around every call. `rest` is what a chunk of the policy
            takes besides its stages.
    """

    policy: str
    device: str
    dtype: str
    batch_size: int
    n_action_steps: int
    chunk: list[float] = field(default_factory=list)
    stages: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def chunks_per_second(self) -> float:
        """The rate at which chunks could be predicted one after the other [Hz], at the median."""
        return 1 / float(np.median(self.chunk))

    def to_json(self) -> str:
        """Return everything, with medians and rates, as JSON."""
        summary = {"chunks_per_second": self.chunks_per_second, "actions_per_second": self.actions_per_second}
        return json.dumps(asdict(self) | summary, indent=2) + "\n"

    @property
    def actions_per_second(self) -> float:
        """The control rate that keeps up while the robot waits for every chunk [Hz], at the median."""
        return self.n_action_steps * self.chunks_per_second

    def _display_rows(self) -> tuple[str, dict[str, str]]:
        stages = {name: [sum(calls) for calls in rounds] for name, rounds in self.stages.items()}
        rows = {name: _p50_p95(seconds) for name, seconds in (stages | {"chunk": self.chunk}).items()}
        rate = f"{self.chunks_per_second:.3g} Hz, {self.actions_per_second:.3g} actions per second"
        return f"Speed of {self.policy}, {self.device}, {self.dtype}, batch {self.batch_size}", rows | {"rate": rate}

    def table(self) -> str:
        """Return the stages' and the chunk's percentiles [ms] as a Markdown table, and the rates."""
        rows = {stage: [sum(calls) for calls in rounds] for stage, rounds in self.stages.items()}
        calls = {stage: f"{len(rounds[0])}" for stage, rounds in self.stages.items()}
        lines = [
            "| stage | calls | p50 per call [ms] | p50 per chunk [ms] | p95 per chunk [ms] |",
            "|---|---|---|---|---|",
        ]
        for stage, seconds in rows.items():
            each = np.median([one for calls_of_round in self.stages[stage] for one in calls_of_round])
            lines.append(f"| {stage} | {calls[stage]} | {1000 * each:.3g} | {_milliseconds(seconds)} |")
        lines.append(f"| **chunk** | | | {_milliseconds(self.chunk)} |")
        return "\n".join(
            [
                *lines,
                "",
                f"{self.policy} · {self.device} · {self.dtype} · batch {self.batch_size} · {len(self.chunk)} chunks: "
                f"{self.chunks_per_second:.3g} Hz, or {self.actions_per_second:.3g} actions per second with "
                f"{self.n_action_steps} executed of each",
            ]
        )


def measure_speed(
    pipeline: PolicyPipeline, rounds: int = 20, warmup: int = 3, batch_size: int = 1, num_steps: int | None = None
) -> Speed:
    """Time chunks of a pipeline on random observations, and then its stages.

    Args:
        rounds: chunks that are counted, of each kind.
        warmup: chunks before them that are not.
        batch_size: observations per chunk.
        num_steps: of sampling; by default the policy's.

    Raises:
        InvalidEvaluationError: nothing would be counted.
    """
    if rounds < 1 or batch_size < 1 or warmup < 0:
        raise InvalidEvaluationError(
            f"rounds={rounds} and batch_size={batch_size} must be at least 1, warmup={warmup} at least 0."
        )
    policy, config = pipeline.policy, pipeline.policy.config
    observation, task = example_request(pipeline, batch_size)
    sampling = {} if num_steps is None else {"num_steps": num_steps}
    stages: dict[str, list[list[float]]] = defaultdict(list)

    def now() -> float:
        if policy.device.type != "cpu":
            torch.accelerator.synchronize()
        return perf_counter()

    def timed(name: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = call(*args, **kwargs)
            stages[name][-1].append(now() - start)
            return result

        return run

    def chunk() -> float:
        start = now()
        pipeline.predict_chunk(observation, task, **sampling)
        return now() - start

    def stages_of_a_chunk() -> None:
        for name in ("processor", *policy.stages, "rest", "decode"):
            stages[name].append([])
        inputs = timed("processor", pipeline.prepare)(observation, task)
        with observed_stages(policy, timed):
            predicted = timed("rest", policy.predict_action_chunk)(**inputs, **sampling)
        stages["rest"][-1][0] -= sum(sum(stages[name][-1]) for name in policy.stages)
        state = pipeline.processor.raw_state(observation)
        timed("decode", pipeline.processor.decode_actions)(predicted, state=state)

    for _ in range(warmup):
        chunk()
        stages_of_a_chunk()
    stages.clear()
    seconds = [chunk() for _ in range(rounds)]
    for _ in range(rounds):
        stages_of_a_chunk()
    return Speed(
        policy=config.model_type,
        device=_device_name(policy.device),
        dtype=" and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()})),
        batch_size=batch_size,
        n_action_steps=config.n_action_steps,
        chunk=seconds,
        stages={name: measured for name, measured in stages.items() if measured[0]},
    )


def example_request(pipeline: PolicyPipeline, batch_size: int) -> tuple[dict[str, Any], list[str] | None]:
    """Return random observations in their training range, always the same, and where one is read an instruction."""
    generator = np.random.default_rng(0)
    config, observation = pipeline.policy.config, {}
    processor = pipeline.processor
    history = (config.n_obs_steps,) if config.n_obs_steps > 1 else ()
    for name, feature in processor.input_features.items():
        shape = (batch_size, *history, *feature.shape)
        if name in config.image_features:
            mean = np.reshape((training_colours(processor, name) or (0.5,))[0], (-1, 1, 1))  # (c, 1, 1)
            observation[name] = (generator.random(shape) * 2 * mean * 255).clip(0, 255).astype(np.uint8)
        else:
            low, high = training_range(processor, name) or (0.0, 1.0)
            observation[name] = (low + (high - low) * generator.random(shape)).astype(np.float32)
    return observation, [INSTRUCTION] * batch_size if config.reads_instruction else None


def _p50_p95(seconds: list[float]) -> str:
    low, high = np.percentile(seconds, [50, 95])
    return f"{1000 * low:.3g} ms, p95 {1000 * high:.3g} ms"


def _milliseconds(seconds: list[float]) -> str:
    low, high = np.percentile(seconds, [50, 95])
    return f"{1000 * low:.3g} | {1000 * high:.3g}"


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
