"""Our policies beside LeRobot's, in random configurations: do both compute the same?

    python benchmarks/agreement.py                            # 40 configurations of each policy
    python benchmarks/agreement.py --policy act --seed 17     # one of them, alone
    python benchmarks/agreement.py --policy pi0 --count 200 --start 1000

A seed stands for one configuration: cameras and their sizes, states, widths, depths, normalization, statistics, and
every option of LeRobot's config that changes a number (`agreement_draws.py`). LeRobot builds it with random weights
and saves it with its processors; `PolicyPipeline.from_pretrained` loads that folder. Both get the same raw
observations and the same random draws. Four quantities are compared:

- chunk: normalised, of a batch of raw observations;
- actions: in robot units, over several steps of an episode, with queue, history and temporal ensembling;
- loss: of a batch of raw demonstrations with padding, in training mode, without dropout;
- gradients: of all parameters; of ACT and Diffusion Policy in float64, because rounding turns a unit behind a ReLU on
  in one library and off in the other, and its gradient with it.

A difference is the largest absolute one, and relative to the largest number of the same tensor (of gradients: of the
same parameter, but at least a thousandth of the largest gradient there is). A configuration agrees where every
relative difference is within the tolerance. An option that this library does not have is refused by name when the
folder is loaded, and counted. The exit code is 1 where anything disagrees. benchmarks/README.md says what has to be
installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from agreement_draws import DRAWS, WORDS, Configuration, Draws, draw, gradient_of, in_type
from timing import machine

from manipulators import PolicyPipeline
from manipulators.conversion.published_policy import published_policies
from manipulators.errors import ManipulatorsError

if TYPE_CHECKING:
    from agreement_lerobot import LeRobot

PACKAGES = ["torch", "torchvision", "transformers", "diffusers", "lerobot"]
TOLERANCES = {"chunk": 1e-4, "actions": 1e-4, "loss": 1e-5, "gradients": 1e-4}
# A diffusion step divides by what is left of the actions in the noise, which multiplies rounding.
WIDER = {"diffusion": {"chunk": 1e-3, "actions": 1e-3}}
FLOOR = 1e-3  # of the largest gradient: below it, a parameter's gradients are what rounding leaves of zero
# Fields of our config for what LeRobot's code fixes.
BESIDE: dict[str, dict[str, Any]] = {"pi0": {"loss_over": "steps"}}
# Their networks have units that rounding switches on in one library and off in the other, and gradients with them.
KINKED = ("act", "diffusion")


@dataclass
class Difference:
    """Hold how far two tensors are apart.

    Args:
        absolute: the largest difference.
        relative: the same, divided by the largest number.
        where: the parameter, of gradients.
    """

    absolute: float = 0.0
    relative: float = 0.0
    where: str = ""

    @classmethod
    def of(cls, ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0, where: str = "") -> Difference:
        """Compare two tensors; infinite where their shapes differ or a number is missing."""
        if ours.shape != theirs.shape:
            return cls(math.inf, math.inf, f"{where} {tuple(ours.shape)} against {tuple(theirs.shape)}".strip())
        absolute, largest = (ours.double() - theirs.double()).abs().max().item(), theirs.abs().max().item()
        if not math.isfinite(absolute):
            return cls(math.inf, math.inf, where)
        return cls(absolute, absolute / max(largest, floor) if largest or floor else absolute, where)


@dataclass
class Result:
    """Hold what came of one configuration.

    Args:
        configuration: which.
        differences: per quantity.
        refused: why this library does not load it, where it says so by name.
        failure: what was raised otherwise.
        seconds: how long it took.
    """

    configuration: Configuration
    differences: dict[str, Difference] = field(default_factory=dict)
    refused: str | None = None
    failure: str | None = None
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether both compute the same."""
        tolerances = TOLERANCES | WIDER.get(self.configuration.policy, {})
        complete = self.differences.keys() == tolerances.keys() and self.failure is None
        return complete and all(d.relative <= tolerances[name] for name, d in self.differences.items())

    def line(self) -> str:
        """Say it in a line."""
        name = f"{self.configuration.policy} {self.configuration.seed}"
        if self.refused is not None:
            return f"{name}: refused by name: {self.refused}"
        shown = [f"{which} {d.relative:.1e}{f' ({d.where})' * bool(d.where)}" for which, d in self.differences.items()]
        verdict = "agrees" if self.agrees else f"DIFFERS; --policy {name.replace(' ', ' --seed ')}"
        return f"{name}: {verdict}: {', '.join(shown)}{f'; {self.failure}' if self.failure else ''}"


def own_fields(configuration: Configuration) -> dict[str, Any]:
    """Return the fields of our config that LeRobot's config.json cannot say: what its code fixes, or only names."""
    fields = dict(BESIDE.get(configuration.policy, {}))
    if (sizes := configuration.sizes) is not None:
        paligemma = {"text_config": sizes["text"], "vision_config": sizes["vision"]}
        fields["paligemma_config"] = paligemma | {"projection_dim": sizes["text"]["hidden_size"]}
        fields["gemma_expert_config"] = sizes["expert"]
    return fields


class Ours:
    """This library's policy, loaded from the folder that LeRobot saved.

    Args:
        configuration: which.
        folder: LeRobot's.
        tokenizer: of a policy that reads instructions.
    """

    def __init__(self, configuration: Configuration, folder: Path, tokenizer: Any):
        (self.kind,) = (kind for kind in published_policies() if kind.lerobot_type == configuration.policy)
        self.configuration = configuration
        given = own_fields(configuration) | ({"tokenizer": tokenizer} if configuration.sizes else {})
        self.pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", **given)
        self.config = self.pipeline.policy.config

    def draws(self, size: int, number: int, training: bool = False) -> Draws:
        """Return random numbers of the shapes that the policy takes for a batch of that size."""
        generator = torch.Generator().manual_seed(1000 * self.configuration.seed + number)
        draws = {}
        for name, like in self.config.example_draws(size, training=training).items():
            if name == "crop_offsets":
                camera = next(iter(self.config.image_features.values()))
                seen = self.config.resize_shape or camera.shape[1:]
                rooms = [whole - cropped for whole, cropped in zip(seen, self.config.crop_shape, strict=True)]
                columns = [torch.randint(room + 1, (len(like),), generator=generator) for room in rooms]
                draws[name] = torch.stack(columns, dim=1)
            elif like.is_floating_point():
                normal = torch.randn(like.shape, generator=generator)
                draws[name] = normal.sigmoid() if name == "time" else normal
            else:
                draws[name] = torch.randint(self.config.num_train_timesteps, like.shape, generator=generator)
        return draws

    def batch(self, size: int, number: int, labels: bool = False) -> dict[str, Any]:
        """Return a batch as this library's processor prepares it from raw numbers."""
        leading = (size,) if self.configuration.history == 1 else (size, self.configuration.history)
        observation = {n: self.configuration.values(n, leading, number) for n in self.configuration.observed}
        given: dict[str, Any] = {"task": self.configuration.tasks(size, number)}
        if labels:
            given["actions"], given["action_is_pad"] = self.configuration.labels(number)
        return dict(self.pipeline.processor(observation, **given))

    def chunk(self, size: int, number: int, draws: Draws) -> torch.Tensor:
        """Return a normalised chunk (b, h, a) for a batch, without the padding of its width."""
        chunk = self.pipeline.policy.eval().predict_action_chunk(**self.batch(size, number), **draws)
        return chunk[..., : self.config.robot_action_dim]

    def actions(self, observations: list[dict[str, Any]], tasks: list[str], draws: list[Draws]) -> torch.Tensor:
        """Return the actions (steps, a) of an episode in robot units."""
        self.pipeline.reset()
        steps = zip(observations, tasks, draws, strict=True)
        return torch.stack([self.pipeline(observation, task=task, **drawn) for observation, task, drawn in steps])

    def loss_and_gradients(
        self, size: int, number: int, draws: Draws, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Draws]:
        """Return the training loss of a batch and the gradients under our names, computed in that type."""
        policy = self.pipeline.policy.to(dtype).train()
        policy.zero_grad()
        loss = policy(**in_type(self.batch(size, number, labels=True), dtype), **draws).loss
        loss.backward()
        return loss.detach(), {name: gradient_of(p) for name, p in policy.named_parameters()}


def compare(configuration: Configuration, folder: Path) -> Result:
    """Build a configuration in LeRobot, load what it saves, and compare both."""
    from agreement_lerobot import LeRobot

    result, start = Result(configuration), time.perf_counter()
    try:
        theirs = LeRobot(configuration, folder, WORDS)
        ours = Ours(configuration, folder, theirs.tokenizer)
        measure(ours, theirs, result.differences)
    except ManipulatorsError as error:
        if configuration.rare is not None and configuration.rare in str(error):
            result.refused = str(error).replace(str(folder), "the folder")
        else:
            result.failure = f"{type(error).__name__}: {error}"
    except Exception as error:
        result.failure = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    result.seconds = time.perf_counter() - start
    return result


def measure(ours: Ours, theirs: LeRobot, differences: dict[str, Difference]) -> None:
    """Compute the four quantities by both, and note how far they are apart."""
    configuration = ours.configuration
    size, steps = len(configuration.padding), configuration.steps

    draws = ours.draws(size, 0)
    differences["chunk"] = Difference.of(ours.chunk(size, 0, draws), theirs.chunk(size, 0, draws))

    observations = [{n: configuration.values(n, (), 1 + k) for n in configuration.observed} for k in range(steps)]
    tasks = configuration.tasks(steps, 1)
    drawn = [ours.draws(1, 1 + k) for k in range(steps)]
    taken = [side.actions(observations, tasks, drawn) for side in (ours, theirs)]
    differences["actions"] = Difference.of(*taken)

    draws = ours.draws(size, 100, training=True)
    found = [side.loss_and_gradients(size, 100, draws, torch.float32) for side in (ours, theirs)]
    differences["loss"] = Difference.of(*(loss for loss, _ in found))
    if configuration.policy in KINKED:
        draws = in_type(draws, torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            found = [side.loss_and_gradients(size, 100, draws, torch.float64) for side in (ours, theirs)]
        finally:
            torch.set_default_dtype(torch.float32)
    (_, our_gradients), (_, published) = found
    their_gradients = ours.kind.rename(published)
    floor = FLOOR * max(gradient.abs().max().item() for gradient in their_gradients.values())
    missing = torch.tensor(math.nan)
    differences["gradients"] = max(
        (
            Difference.of(our_gradients.get(name, missing), their_gradients.get(name, missing), floor, name)
            for name in our_gradients | their_gradients
        ),
        key=lambda difference: difference.relative,
    )


# --- the report -------------------------------------------------------------------------------------------


def row(policy: str, results: list[Result]) -> str:
    """Return a policy's line of the Markdown table."""
    compared = [result for result in results if result.refused is None]
    cells = [policy, str(len(results)), str(sum(r.agrees for r in results)), str(len(results) - len(compared))]
    for name in TOLERANCES:
        found = [result.differences[name] for result in compared if name in result.differences]
        worst = max(found, key=lambda difference: difference.relative, default=Difference(math.nan, math.nan))
        absolute = max((difference.absolute for difference in found), default=math.nan)
        cells.append(f"{absolute:.1e} / {worst.relative:.1e}{f' (`{worst.where}`)' * bool(worst.where)}")
    wrong = [result.configuration.seed for result in compared if not result.agrees]
    cells.append(f"`--policy {policy} --seed {wrong[0]}`" if wrong else "none")
    return f"| {' | '.join(cells)} |"


def report(results: Iterable[Result], described: dict[str, str]) -> str:
    """Return the table, the tolerances, what was refused, and the machine."""
    by_policy: dict[str, list[Result]] = {}
    for result in results:
        by_policy.setdefault(result.configuration.policy, []).append(result)
    quantities = " | ".join(f"{name}, abs. / rel." for name in TOLERANCES)
    refused = [r for found in by_policy.values() for r in found if r.refused is not None]
    lines = [
        f"| policy | drawn | agree | refused by name | {quantities} | first that differs |",
        f"|{'---|' * (5 + len(TOLERANCES))}",
        *(row(policy, found) for policy, found in by_policy.items()),
        "",
        f"Tolerances, relative: {_listed(TOLERANCES)}"
        + "".join(f"; of {policy} {_listed(WIDER[policy])}" for policy in by_policy if policy in WIDER),
        *(f"Refused: {result.line()}" for result in refused),
        "",
        " · ".join(f"{name} {value}" for name, value in described.items()),
    ]
    return "\n".join(lines) + "\n"


def _listed(tolerances: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in tolerances.items())


def write(folder: Path, results: list[Result], described: dict[str, str]) -> None:
    """Write `agreement.md`, the table, and `agreement.json`, every configuration with its differences."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.md").write_text(report(results, described), encoding="utf-8")
    values = {"machine": described, "tolerances": TOLERANCES, "wider": WIDER}
    values["results"] = [asdict(result) for result in results]
    (folder / "agreement.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Compare the chosen configurations, print and write the table; return 1 where anything disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--count", type=int, default=40, help="configurations of each policy")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this configuration alone")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    if find_spec("lerobot") is None:
        parser.error(
            "LeRobot is not installed in this interpreter, and there is nothing to agree with. It needs Python 3.12: "
            "pip install --no-deps lerobot==0.6.1, and what benchmarks/README.md lists beside it."
        )
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    described = machine(PACKAGES)
    alone = arguments.seed is not None
    seeds = [arguments.seed] if alone else range(arguments.start, arguments.start + arguments.count)
    results = []
    for policy in arguments.policy:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                result = compare(draw(policy, seed), Path(folder))
            print(result.line(), flush=True)
            results.append(result)
    if alone:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        write(arguments.output, results, described)
    print("\n" + report(results, described))
    return int(any(result.refused is None and not result.agrees for result in results))


if __name__ == "__main__":
    logging.getLogger("manipulators").setLevel(logging.ERROR)  # what is drawn looks like no training
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
