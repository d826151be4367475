"""Give every tiny policy bad observations between good ones, and compare with a pipeline that never saw them.

    python benchmarks/faults.py                          # 2000 bad observations per policy, some minutes
    python benchmarks/faults.py --only 'pi0*' --count 200

Observations, instructions and arguments are spoiled in all ways below. What a robot may rely on:

- every exception is one of errors.py;
- a refused observation leaves nothing behind: the next good one gives, to the bit, the action and the report of a twin
  pipeline that never saw it; queue, history, temporal ensembling and random generators are where they were;
- a bad observation that is accepted, because it might be right, is named by `pipeline.observation_report`;
- a good one in unusual arrays gives the action of the plain one, up to rounding.

Exit status 1 where any of it does not hold.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import logging
import runpy
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from manipulators import AutoPolicy, BasePolicyModel, PolicyPipeline
from manipulators.errors import ManipulatorsError
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "policy_cases.py"))
STATE, TASK = "observation.state", "push the red button"
# The training data: states of 0 to 1, pictures of more red than blue.
COLOURS, SPREAD = (0.65, 0.5, 0.3), 0.12
EPISODE = 40  # observations between two resets


class Spoiled(NamedTuple):
    """An observation with something wrong about it, or, where `plain` is given, a good one in unusual arrays.

    `named` says what the report must name if it is accepted: the feature, and of a camera the finding.
    """

    observation: Any
    task: Any
    sampling: dict[str, Any] = {}
    named: tuple[str, str] | None = None
    plain: dict[str, Any] | None = None


# --- good observations ------------------------------------------------------------------------------------


class World:
    """Make good observations of one robot, or of several: states move a little, pictures are never the same twice."""

    def __init__(self, config, rng: np.random.Generator, batch: int | None):
        self.config, self.rng = config, rng
        self.leading = () if batch is None else (batch,)
        self.task = TASK if config.reads_instruction else None
        self.vectors = [n for n, f in config.input_features.items() if n not in config.image_features]
        self.cameras = list(config.image_features)
        self.values = {n: rng.uniform(0.3, 0.7, (*self.leading, self.width(n))) for n in self.vectors}

    def width(self, name: str) -> int:
        return self.config.input_features[name].shape[0]

    def observation(self) -> dict[str, np.ndarray]:
        for name, x in self.values.items():
            self.values[name] = np.clip(x + self.rng.normal(0, 0.02, x.shape), 0.05, 0.95)
        vectors = {name: x.astype(np.float32) for name, x in self.values.items()}
        return vectors | {name: self.picture(name) for name in self.cameras}

    def picture(self, name: str) -> np.ndarray:
        channels, height, width = self.config.input_features[name].shape
        levels = self.rng.normal(COLOURS[:channels], SPREAD, (*self.leading, height, width, channels))
        return (np.clip(levels, 0, 1) * 255).astype(np.uint8)


# --- what can be wrong ------------------------------------------------------------------------------------

WHOLE = {
    "no mapping": lambda rng: [None, [1.0], "state", 3, np.zeros(3), object(), {1, 2}][rng.integers(7)],
    "empty": lambda rng: {},
}
VALUES = {
    "text": lambda x, rng: ["0.5", b"0.5", np.array("text"), np.array(["a"] * 3), list("abc")][rng.integers(5)],
    "nothing": lambda x, rng: None,
    "object": lambda x, rng: [object(), {}, {1.0}, lambda: 0, Exception][rng.integers(5)],
    "object array": lambda x, rng: x.astype(object),
    "time": lambda x, rng: np.zeros(x.shape, "datetime64[s]"),
    "structured": lambda x, rng: np.zeros(x.shape, [("x", "f4")]),
    "ragged": lambda x, rng: [[1.0], [1.0, 2.0]],
    "deep": lambda x, rng: _deep(),
    "masked": lambda x, rng: np.ma.masked_array(x, mask=np.ones(x.shape, bool)),
    "complex": lambda x, rng: x.astype(complex),
    "scalar": lambda x, rng: 0.5,
    "empty list": lambda x, rng: [],
    "no numbers": lambda x, rng: x[..., :0],
    "cut": lambda x, rng: x[..., :-1],
    "wider": lambda x, rng: np.concatenate([x, x[..., :1]], -1),
    "too many dimensions": lambda x, rng: x[None, None, None],
    "meta tensor": lambda x, rng: torch.from_numpy(x).to("meta"),
    "sparse tensor": lambda x, rng: torch.from_numpy(x).to_sparse(),
    "8-bit float tensor": lambda x, rng: torch.from_numpy(x).float().div(255).to(torch.float8_e4m3fn),
    "quantised tensor": lambda x, rng: torch.quantize_per_tensor(torch.from_numpy(x).float(), 0.1, 0, torch.quint8),
    "nested tensor": lambda x, rng: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "other byte order": lambda x, rng: x.astype(np.dtype(np.float32).newbyteorder()),
    "raises": lambda x, rng: _Raises(),
    "another batch": lambda x, rng: np.concatenate([x, x]) if x.ndim in (2, 4) else x[None].repeat(3, 0),
    "no batch": lambda x, rng: x[:0] if x.ndim in (2, 4) else x[None][:0],
}
VECTORS = VALUES | {
    "NaN": lambda x, rng: _one(x, rng, np.nan),
    "infinity": lambda x, rng: _one(x, rng, [np.inf, -np.inf][rng.integers(2)]),
    "too large for float32": lambda x, rng: _one(x.astype(np.float64), rng, 1e39),
    "3e38": lambda x, rng: _one(x, rng, 3e38),
    "10000": lambda x, rng: _one(x, rng, [1e4, -1e4][rng.integers(2)]),
    "millimetres": lambda x, rng: x * 1000,
    "a list with NaN": lambda x, rng: _one(x, rng, np.nan).tolist(),
    "half a NaN": lambda x, rng: torch.from_numpy(_one(x, rng, np.nan)).half(),
}
# Accepted, and named.
FAR_VECTORS = {
    "degrees": lambda x, rng: np.rad2deg(x),
    "beyond the range": lambda x, rng: _one(x, rng, [5.0, -5.0, 40.0][rng.integers(3)]),
}
PICTURES = VALUES | {
    "float up to 255": lambda x, rng: x.astype(np.float32),
    "float below 0": lambda x, rng: x.astype(np.float32) / 127.5 - 1,
    "NaN": lambda x, rng: _one(x.astype(np.float32) / 255, rng, np.nan),
    "infinity": lambda x, rng: _one(x.astype(np.float64) / 255, rng, np.inf),
    "half infinity": lambda x, rng: torch.from_numpy(_one(x.astype(np.float32) / 255, rng, np.inf)).bfloat16(),
    "int64": lambda x, rng: x.astype(np.int64),
    "uint16": lambda x, rng: x.astype(np.uint16),
    "bool": lambda x, rng: x > 127,
    "no channels": lambda x, rng: x[..., 0],
    "four channels": lambda x, rng: np.concatenate([x, x[..., :1]], -1),
    "no rows": lambda x, rng: x[..., :0, :, :],
    "two sizes": lambda x, rng: [x, x[..., 1:, :, :]],
    "flattened": lambda x, rng: x.reshape(-1),
    "PIL 1, L, P, RGBA, CMYK, …": lambda x, rng: _pil(x, rng),
    "a truncated list": lambda x, rng: [x.tolist(), x[..., 0].tolist()],
}
FAR_PICTURES = {
    "black": ("flat", lambda x, rng: np.zeros_like(x)),
    "white": ("flat", lambda x, rng: np.full_like(x, 255)),
    "scaled twice": ("flat", lambda x, rng: x.astype(np.float32) / 255 / 255),
    "uint8 of 0 and 1": ("flat", lambda x, rng: (x > 127).astype(np.uint8)),
    "inverted": ("brightness", lambda x, rng: 255 - x),
    "overexposed": ("brightness", lambda x, rng: np.clip(x.astype(int) + 90, 0, 255).astype(np.uint8)),
    "BGR": ("channels", lambda x, rng: x[..., ::-1]),
}
TASKS = {
    "no instruction": lambda rng: None,
    "no text": lambda rng: [3, b"push", 2.5, {"a": 1}, {TASK}, object(), np.array([TASK])][rng.integers(7)],
    "empty instruction": lambda rng: ["", "  \n", []][rng.integers(3)],
    "too many instructions": lambda rng: [TASK] * 7,
    "one is no text": lambda rng: [[None], [3], [["a"]], [TASK, None]][rng.integers(4)],
    "half a character": lambda rng: "push \ud800",
    "a special token": lambda rng: f"push {['<pad>', '<eos>', '<unk>', '<bos>'][rng.integers(4)]} the button",
}
ARGUMENTS = {
    "no such argument": lambda rng: {["state", "pixel_values", "actions", "nose"][rng.integers(4)]: torch.zeros(1)},
    "argument of another type": lambda rng: [
        {"generator": 3},
        {"noise": [0.0]},
        {"num_steps": 2.5},
        {"num_steps": "3"},
        {"num_steps": 0},
        {"step_noise": "x"},
    ][rng.integers(6)],
}
# Good numbers in unusual arrays: the action is that of the plain ones.
HARMLESS = {
    "read-only": lambda x: _read_only(x),
    "in the order of another array": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "Fortran order": lambda x: np.asfortranarray(x),
    "tensor": lambda x: torch.from_numpy(x.copy()),
    "tensor of another order": lambda x: torch.from_numpy(np.moveaxis(x, -1, 0).copy()).movedim(0, -1),
    "list": lambda x: x.tolist() if x.dtype != np.uint8 else [*x],
    "with a gradient": lambda x: torch.from_numpy(x).requires_grad_() if x.dtype == np.float32 else x,
    "masked nowhere": lambda x: np.ma.masked_array(x),
    "subclass": lambda x: x.view(_Subclass),
}


def spoiled(world: World, rng: np.random.Generator, good: dict[str, np.ndarray]) -> tuple[str, Spoiled]:
    """Return one way of spoiling a good observation, by name."""
    task, kind = world.task, rng.random()
    if kind < 0.03:
        name = _any(rng, WHOLE)
        return name, Spoiled(WHOLE[name](rng), task)
    if kind < 0.10:
        return _other_names(world, rng, good)
    if kind < 0.18:
        name = _any(rng, ARGUMENTS)
        return name, Spoiled(good, task, ARGUMENTS[name](rng))
    if kind < 0.28 and task is not None:
        name = _any(rng, TASKS)
        return name, Spoiled(good, TASKS[name](rng))
    feature = _any(rng, good)
    x = good[feature]
    if kind < 0.38:
        name = _any(rng, HARMLESS)
        return f"good: {name}", Spoiled(good | {feature: HARMLESS[name](x)}, task, plain=good)
    is_camera = feature in world.cameras
    if kind < 0.58:
        far = FAR_PICTURES if is_camera else FAR_VECTORS
        name = _any(rng, far)
        finding, spoil = far[name] if is_camera else ("range", far[name])
        return name, Spoiled(good | {feature: spoil(x, rng)}, task, named=(feature, finding))
    ways = PICTURES if is_camera else VECTORS
    if len(good) == 1:  # which of an observation's batches is the right one, only another feature tells
        ways = {name: spoil for name, spoil in ways.items() if name != "another batch"}
    name = _any(rng, ways)
    return name, Spoiled(good | {feature: ways[name](x, rng)}, task)


def _other_names(world: World, rng: np.random.Generator, good: dict[str, np.ndarray]) -> tuple[str, Spoiled]:
    feature = _any(rng, good)
    without = {name: x for name, x in good.items() if name != feature}
    name = ["missing", "misspelt", "unknown", "not a name", "whole and in parts"][rng.integers(5)]
    if name == "missing" and feature in world.config.optional_cameras and without:
        return "good: without an optional camera", Spoiled(without, world.task, plain=without)
    changed = {
        "missing": without,
        "misspelt": without | {feature + "s": good[feature]},
        "unknown": good | {"observation.force": np.zeros(3)},
        "not a name": good | {[3, None, (1, 2), 2.5][rng.integers(4)]: np.zeros(3)},
        "whole and in parts": good | {"state.state": np.zeros(3), "state.arm": np.zeros(2)},
    }
    return name, Spoiled(changed[name], world.task)


def _any(rng: np.random.Generator, names: Mapping[str, Any]) -> str:
    return list(names)[rng.integers(len(names))]


def _one(x: np.ndarray, rng: np.random.Generator, value: float) -> np.ndarray:
    x = x.copy()
    x.reshape(-1)[rng.integers(x.size)] = value
    return x


def _deep() -> list:
    nested: list = [0.5]
    for _ in range(3000):
        nested = [nested]
    return nested


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _pil(x: np.ndarray, rng: np.random.Generator) -> Image.Image:
    modes = ("1", "L", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "LA")
    mode = modes[rng.integers(len(modes))]
    if mode in ("I;16", "LAB"):
        return Image.new(mode, x.shape[-3:-1][::-1])
    return Image.fromarray(x.reshape(-1, *x.shape[-3:])[0]).convert(mode)


class _Subclass(np.ndarray):
    """An array of another class, as some drivers return."""


class _Raises:
    """An object that fails when it is asked for its numbers, as a closed file of a driver does."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AttributeError("the device is closed")


# --- pipelines --------------------------------------------------------------------------------------------


def pipelines_of(config, prepare: Callable = lambda policy: policy, **options: Any) -> tuple[PolicyPipeline, ...]:
    """Return two equal pipelines of a tiny policy with processors of their own; see `COLOURS` for its statistics."""
    torch.manual_seed(0)
    policy = AutoPolicy.from_config(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy = prepare(policy)
    ends = {"mean": 0.5, "std": 0.25, "min": 0.0, "max": 1.0, "q01": 0.0, "q99": 1.0}
    statistics = {
        name: {which: [end] * feature.shape[0] for which, end in ends.items()}
        for name, feature in (config.input_features | config.output_features).items()
    }
    for name, feature in config.image_features.items():
        statistics[name] |= {"mean": list(COLOURS[: feature.shape[0]]), "std": [SPREAD] * feature.shape[0]}
    words = {"tokenizer": word_tokenizer([TASK])} if config.reads_instruction else {}
    processor = processor_class(config).from_config(config, statistics, **words)
    parts = (processor, copy.deepcopy(processor))
    return tuple(PolicyPipeline(model=policy, processor=part, device="cpu", **options) for part in parts)


class Robot:
    """Call a pipeline with random generators of its own: torch's, and one that is passed."""

    def __init__(self, pipeline: PolicyPipeline):
        self.pipeline = pipeline
        self.generator = torch.Generator().manual_seed(1)
        self.state = torch.Generator().manual_seed(2).get_state()

    def act(self, observation: Any, task: Any, sampling: Mapping[str, Any], passed: bool, chunk: bool) -> torch.Tensor:
        sampling = ({"generator": self.generator} if passed else {}) | dict(sampling)
        torch.set_rng_state(self.state)
        try:
            return (self.pipeline.predict_chunk if chunk else self.pipeline)(observation, task, **sampling)
        finally:
            self.state = torch.get_rng_state()


@dataclass
class Outcome:
    """Count what became of the spoiled observations of one policy; `faults` says what must not have happened."""

    refused: int = 0
    named: int = 0
    harmless: int = 0
    kinds: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    foreign: int = 0
    traces: int = 0
    unnamed: int = 0


def fuzz(pipelines: tuple[PolicyPipeline, PolicyPipeline], count: int, seed: int = 0) -> Outcome:
    """Give the first of two equal pipelines spoiled observations between the good ones that both are given."""
    first, second = (Robot(pipeline) for pipeline in pipelines)
    outcome = Outcome()
    config = first.pipeline.policy.config
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        if i % EPISODE == 0:
            world = World(config, np.random.default_rng((seed, i)), None if i // EPISODE % 2 else 2)
            first.pipeline.reset()
            second.pipeline.reset()
            started = rng.random() < 0.5  # or the very first observation of the episode is a spoiled one
            if started:
                _both(first, second, world, outcome, f"{i}, before", rng)
        if world.cameras and STATE in world.vectors and rng.random() < 0.03:
            name = "frozen camera"
            _frozen(first, second, world, outcome, f"{i}, {name}", rng)
        else:
            name, bad = spoiled(world, rng, world.observation())
            # `predict_chunk` takes a batch with its history, which these observations lack.
            chunk = rng.random() < 0.2 and (config.n_obs_steps == 1 or not world.leading)
            _one_spoiled(first, second, bad, outcome, f"{i}, {name}", passed=rng.random() < 0.5, chunk=chunk)
        outcome.kinds[name] += 1
        _both(first, second, world, outcome, f"{i}, after {name}", rng)
    return outcome


def _one_spoiled(first: Robot, second: Robot, bad: Spoiled, outcome: Outcome, where: str, **how: bool) -> None:
    before = first.pipeline.observation_report
    try:
        action = first.act(bad.observation, bad.task, bad.sampling, **how)
    except ManipulatorsError as error:
        outcome.refused += 1
        if bad.plain is not None:
            outcome.faults.append(f"{where}: good, but refused: {error}")
        return
    except Exception:
        outcome.foreign += 1
        outcome.faults.append(f"{where}: {traceback.format_exc(limit=-3)}")
        return
    given = bad.observation if bad.plain is None else bad.plain
    expected = second.act(given, bad.task, bad.sampling, **how)
    rounded = bad.plain is not None and "order" in where
    close = torch.allclose(action, expected, atol=1e-5, rtol=1e-4) if rounded else torch.equal(action, expected)
    if not close:
        outcome.traces += 1
        outcome.faults.append(f"{where}: another action than the twin's")
    if bad.plain is not None:
        outcome.harmless += 1
        if rounded:  # sums over another order in memory are others in their last bits
            first.pipeline.reset()
            second.pipeline.reset()
        return
    if bad.named is None or not _names_more(first.pipeline.observation_report, before, *bad.named):
        outcome.unnamed += 1
        outcome.faults.append(f"{where}: accepted, and the report does not name {bad.named}")
    else:
        outcome.named += 1


def _frozen(first: Robot, second: Robot, world: World, outcome: Outcome, where: str, rng: np.random.Generator) -> None:
    """Repeat a picture while the state moves; the first two times it may be the same by chance."""
    name, before = _any(rng, world.cameras), first.pipeline.observation_report
    still = world.observation()[name]
    for place in (0.2, 0.4, 0.6):
        world.values[STATE][:] = place
        _both(first, second, world, outcome, where, rng, {name: still})
    if _names_more(first.pipeline.observation_report, before, name, "frozen"):
        outcome.named += 1
    else:
        outcome.unnamed += 1
        outcome.faults.append(f"{where}: the report does not name {name}")


def _names_more(after: Any, before: Any, feature: str, finding: str) -> bool:
    """Tell whether a report has more of a finding than before."""

    def times(report: Any) -> float:
        dimensions = [outside.share for outside in report.dimensions.get(feature, {}).values()]
        share = sum(dimensions) if finding == "range" else report.cameras.get(feature, {}).get(finding, 0)
        return share * report.observations

    return times(after) > times(before) + 0.5


def _both(
    first: Robot,
    second: Robot,
    world: World,
    outcome: Outcome,
    where: str,
    rng: np.random.Generator,
    changed: Mapping[str, np.ndarray] = {},
) -> None:
    """Give both a good observation, and compare actions, reports and random generators."""
    observation, passed = world.observation() | dict(changed), rng.random() < 0.5
    try:
        actions = [robot.act(observation, world.task, {}, passed, chunk=False) for robot in (first, second)]
    except Exception:
        outcome.traces += 1
        outcome.faults.append(f"{where}: a good one fails: {traceback.format_exc(limit=-3)}")
        return
    states = [(r.pipeline.observation_report, r.pipeline.outside_training_range) for r in (first, second)]
    draws = [(robot.generator.get_state(), robot.state) for robot in (first, second)]
    same = states[0] == states[1] and all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    if not (torch.equal(*actions) and same):
        outcome.traces += 1
        outcome.faults.append(f"{where}: the twin's next action, report or random numbers are others")


# --- policies ---------------------------------------------------------------------------------------------


def _with_lora(policy):
    from peft import LoraConfig

    layers = [name for name, module in policy.named_modules() if type(module) is torch.nn.Linear]
    policy.add_adapter(LoraConfig(target_modules=layers[-2:], init_lora_weights=False))
    return policy.eval()


def _custom_config():
    """Return the config of a policy after InternManip's template, which has neither backbone nor head of ours."""

    @BasePolicyModel.register("custom_for_faults")
    class Custom(BasePolicyModel):
        def __init__(self, config: dict):
            super().__init__()
            self.layer = torch.nn.Linear(6, config["action_horizon"] * 2)

        def inference(self, batch):
            x = torch.cat([batch[STATE], batch["observation.images.above"].mean((-1, -2))], -1)
            chunk = self.layer(x).unflatten(-1, (-1, 2))
            return {"action_pred": chunk + 0.1 * torch.randn_like(chunk)}

    return Custom.config_class(custom={"action_horizon": 5}, **TINY["features_of"](TINY["TWO_CAMERAS"], 3, None))


VARIANTS: dict[str, Callable[[], tuple[PolicyPipeline, ...]]] = {
    name: lambda case=case: pipelines_of(case.config()) for name, case in TINY["CASES"].items()
} | {
    "act, ensembling": lambda: pipelines_of(
        TINY["tiny_act"](TINY["TWO_CAMERAS"], n_action_steps=1, temporal_ensemble_coeff=0.01)
    ),
    "diffusion, an optional camera": lambda: pipelines_of(
        TINY["tiny_diffusion"](TINY["TWO_CAMERAS"], optional_cameras=("observation.images.above",))
    ),
    "pi0, an adapter": lambda: pipelines_of(TINY["tiny_pi0"](), _with_lora),
    "custom": lambda: pipelines_of(_custom_config()),
    "act, bounded": lambda: pipelines_of(TINY["tiny_act"](), clamp_actions=True, max_action_step=0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="spoiled observations per policy (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of all of them (default: 0)")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of policies")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    failed = 0
    print("| policy | spoiled | refused | accepted, named | good | foreign exceptions | traces | unnamed |")
    print("|---|---|---|---|---|---|---|---|")
    for name, pipelines in VARIANTS.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            continue
        result = fuzz(pipelines(), options.count, options.seed)
        counts = (options.count, result.refused, result.named, result.harmless)
        print(
            "|", " | ".join(map(str, (name, *counts, result.foreign, result.traces, result.unnamed))), "|", flush=True
        )
        for fault in result.faults[:20]:
            print(fault, file=sys.stderr)
        failed += len(result.faults)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
