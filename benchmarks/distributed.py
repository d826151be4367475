"""Train every policy in two processes, and compare with one process.

    python benchmarks/distributed.py                       # all policies, in two processes on the CPU
    python benchmarks/distributed.py --only pi0 act_two_cameras --cells ddp resume

Tiny policies with random weights, of tests/policy_cases.py, on random samples in which episodes end. The draws of
noise, time and latent are given with the samples, and nothing is dropped out. One process takes the same steps of SGD
by torch alone, with all samples of a step in one batch. A cell is the largest difference of a trained weight, in
shares of the largest change that the training made to any; above 1e-3, or not finite, it ends the run with status 1.

ddp           `PolicyTrainer` in two processes, each with half of every batch
accumulate    the same, in two batches that are accumulated
lora          the same as ddp, of LoRA layers in the action head, on a checkpoint that was saved before
unused        the same as ddp, of a policy with a parameter that no step reaches
fsdp2         `fully_shard` on the modules that the policy names, one step; besides the share of the weights that the
              fuller of both processes holds, and the difference of what is saved and one process loads (must be 0)
trainer       `PolicyTrainer` with FSDP2 of accelerate, which is made to use it on a CPU, with averaged weights; then a
              checkpoint in the middle, from which another trainer goes on (to the same bits)
trainer_lora  the same, of LoRA layers
resume        `PolicyTrainer` in two processes with dropout and draws of its own; from a checkpoint in the middle on,
              against the run that was not interrupted (must be 0)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLICIES = (
    *("act_two_cameras", "diffusion_two_cameras", "pi0", "pi05", "gr00t_n1_5", "gr00t_n1"),
    "composed_act_flow_matching",
)
CELLS = ("ddp", "accumulate", "lora", "unused", "fsdp2", "trainer", "trainer_lora", "resume")
STEPS, SAMPLES = 2, 4  # samples of a step, in both processes together
LORA = {"tune_diffusion_model": "lora", "lora_rank": 2}
OF_A_BATCH = {"crop_offsets"}  # draws that all samples of a batch share
ARGUMENTS = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_steps": STEPS,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "use_cpu": True,
}


# --- in each process --------------------------------------------------------------------------------------


def samples_of(config: Any) -> list[dict[str, Any]]:
    """Return model inputs with labels and draws, one sample each; episodes end in every second one."""
    import torch

    count = STEPS * SAMPLES
    batch = config.example_inputs(count) | config.example_draws(count, training=True)
    horizon = config.action_horizon
    real = torch.tensor([1 + (3 * i) % horizon if i % 2 else horizon for i in range(count)])
    batch["action_is_pad"] = torch.arange(horizon) >= real[:, None]
    return [{name: _item(name, value, i) for name, value in batch.items()} for i in range(count)]


def _item(name: str, value: Any, i: int) -> Any:
    if name in OF_A_BATCH:
        return value
    return [part[i] for part in value] if isinstance(value, list) else value[i]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return samples as one batch."""
    import torch

    batch = {}
    for name, value in samples[0].items():
        values = [sample[name] for sample in samples]
        if name in OF_A_BATCH:
            batch[name] = value
        elif isinstance(value, list):
            batch[name] = [torch.stack(views) for views in zip(*values, strict=True)]
        else:
            batch[name] = torch.stack(values)
    return batch


class Worker:
    """What one of the processes measures.

    Args:
        folder: that both processes see.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases = runpy.run_path(str(ROOT / "tests" / "policy_cases.py"))

    def build(self, case: str) -> Any:
        """Return a policy without chance of its own, with the same weights in every process."""
        import torch

        from manipulators import AutoPolicy

        config = self.cases["CASES"][case].config()
        if hasattr(config, "language_dropout_prob"):
            config.language_dropout_prob = 0.0
        torch.manual_seed(0)
        return without_dropout(AutoPolicy.from_config(config))

    def new_trainer(self, policy: Any, output: Path, samples: list[dict[str, Any]], **arguments: Any) -> Any:
        from manipulators import PolicyTrainer, PolicyTrainingArguments

        values = ARGUMENTS | {"per_device_train_batch_size": SAMPLES // 2} | arguments
        return PolicyTrainer(
            policy,
            PolicyTrainingArguments(str(output), **values),
            self.cases["processor_of"](policy.config),
            train_dataset=samples,
            data_collator=collate,
        )

    def ddp(self, case: str, output: Path, change: Callable[[Any], Any] = lambda policy: policy, **arguments: Any):
        policy = change(self.build(case))
        samples = samples_of(policy.config)
        trainer = self.new_trainer(policy, output, samples, **arguments)
        before, expected = copy.deepcopy(policy), copy.deepcopy(policy)
        losses = train_alone(expected, samples)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "weights": relative_difference(policy, expected, before),
            "loss": max(abs(a - b) for a, b in zip(logged, losses, strict=True)),
        }

    def accumulate(self, case: str, output: Path):
        sizes = {"per_device_train_batch_size": SAMPLES // 4, "gradient_accumulation_steps": 2}
        return self.ddp(case, output, **sizes)

    def lora(self, case: str, output: Path):
        loaded = self.loaded(case)
        return self.ddp(case, output, lambda _: loaded(), **LORA)

    def loaded(self, case: str) -> Callable[[], Any]:
        """Return what loads the policy from a checkpoint, as an adapter needs it."""
        from torch.distributed import barrier

        from manipulators import AutoPolicy

        base = self.folder / f"{case}-base"
        self.build(case).save_pretrained(base)
        barrier()  # the first process writes
        return lambda: without_dropout(AutoPolicy.from_pretrained(base))

    def unused(self, case: str, output: Path):
        def with_unused(policy: Any) -> Any:
            import torch

            policy.unused = torch.nn.Linear(2, 2)
            return policy

        return self.ddp(case, output, with_unused)

    def fsdp2(self, case: str, output: Path):
        import torch
        from torch.distributed import all_reduce, get_rank
        from torch.distributed.fsdp import fully_shard

        from manipulators import AutoPolicy

        policy = self.build(case)
        before, expected = copy.deepcopy(policy), copy.deepcopy(policy)
        samples = samples_of(policy.config)[:SAMPLES]
        for sample in samples:  # FSDP2 averages gradients: the halves hold as many real steps
            sample["action_is_pad"].fill_(False)
        losses = train_alone(expected, samples)
        for module in list(policy.modules()):
            if type(module).__name__ in policy._no_split_modules:
                fully_shard(module)
        fully_shard(policy)
        held = sum(p.to_local().numel() * p.element_size() for p in policy.parameters())
        whole = sum(p.numel() * p.element_size() for p in policy.parameters())
        half = samples[get_rank() * SAMPLES // 2 : (get_rank() + 1) * SAMPLES // 2]
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=ARGUMENTS["learning_rate"])
        loss = policy.train()(**collate(half)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        policy.save_pretrained(output)
        loaded = AutoPolicy.from_pretrained(output)
        figures = torch.stack([torch.tensor(held / whole), loss.detach() / 2])
        share = figures[0].clone()
        all_reduce(share, torch.distributed.ReduceOp.MAX)
        all_reduce(figures)
        full = {name: p.detach().full_tensor() for name, p in policy.named_parameters()}
        return {
            "weights": relative_difference(full, expected, before),
            "loss": abs(figures[1].item() - losses[0]),
            "share": share.item(),
            "loaded": largest_difference(loaded, full),
        }

    def trainer(self, case: str, output: Path):
        return self.sharded(lambda: self.build(case), output)

    def trainer_lora(self, case: str, output: Path):
        return self.sharded(self.loaded(case), output, **LORA)

    def sharded(self, build: Callable[[], Any], output: Path, **arguments: Any):
        import torch
        from torch.distributed import barrier

        from manipulators import AutoPolicy

        def new() -> Any:
            torch.manual_seed(0)  # for the layers of an adapter
            return self.new_trainer(build(), output, samples, use_cpu=False, **values)

        values = {"save_steps": 1, "save_strategy": "steps", "ema_decay": 0.5, "ema_power": 1.0} | arguments
        samples = samples_of(build().config)
        with fsdp2_on_a_cpu():
            trainer = new()
            before, expected = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
            losses = train_alone(expected, samples, averaged=values)
            trainer.train()
            trainer.save_model(str(output / "final"))
            again = new()
            again.train(resume_from_checkpoint=str(output / "checkpoint-1"))
            again.save_model(str(output / "again"))
        barrier()
        saved, resumed = (AutoPolicy.from_pretrained(output / name) for name in ("final", "again"))
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "weights": relative_difference(saved, expected, before),
            "loss": max(abs(a - b) for a, b in zip(logged, losses, strict=True)),
            "loaded": largest_difference(resumed, saved),
        }

    def resume(self, case: str, output: Path):
        import torch

        from manipulators import AutoPolicy

        def own(policy: Any, **arguments: Any) -> Any:
            values = {"optim": "adamw_torch", "train_sampling_strategy": "random", "save_strategy": "steps"}
            names = set(policy.config.example_draws(1, training=True))
            samples = [{n: v for n, v in s.items() if n not in names} for s in samples_of(policy.config)]
            return self.new_trainer(policy, output, samples, save_steps=1, **values | arguments)

        def fresh() -> Any:
            torch.manual_seed(0)
            return AutoPolicy.from_config(self.cases["CASES"][case].config())

        one = own(fresh())
        one.train()
        two = own(fresh())
        two.train(resume_from_checkpoint=str(output / "checkpoint-1"))
        logs = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (one, two)]
        return {
            "weights": largest_difference(two.model, one.model),
            "loss": max(abs(a - b) for a, b in zip(*logs, strict=True)),
        }


def without_dropout(policy: Any) -> Any:
    """Return a policy whose training steps are functions of their inputs."""
    import torch

    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return policy


def train_alone(
    policy: Any, samples: list[dict[str, Any]], averaged: Mapping[str, float] | None = None
) -> list[float]:
    """Take the steps of all processes in this one, by torch alone, and return their losses."""
    import torch

    from manipulators.training.ema import WeightAverage

    policy.train()
    average = None
    if averaged:
        average = WeightAverage(policy, decay=averaged["ema_decay"], power=averaged["ema_power"])
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=ARGUMENTS["learning_rate"])
    losses = []
    for start in range(0, len(samples), SAMPLES):
        loss = policy(**collate(samples[start : start + SAMPLES])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if average is not None:
            average.update()
    if average is not None:
        average.copy_to_weights()
    return losses


def tensors_of(policy: Any) -> Mapping[str, Any]:
    return policy if isinstance(policy, Mapping) else dict(policy.named_parameters())


def largest_difference(one: Any, two: Any) -> float:
    """Return the largest difference of two policies' weights."""
    one, two = tensors_of(one), tensors_of(two)
    names = [name for name in two if name in one]
    return max((one[name] - two[name]).abs().max().item() for name in names)


def relative_difference(found: Any, expected: Any, before: Any) -> float:
    """Return the largest difference of two policies' weights, in shares of the largest change of a weight."""
    return largest_difference(found, expected) / largest_difference(expected, before)


@contextmanager
def fsdp2_on_a_cpu():
    """Make accelerate use FSDP2 in this process, which it does on GPUs only."""
    from unittest.mock import patch

    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    backend = patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
    with (
        backend,
        patch.dict(os.environ, environment),
        patch("manipulators.training.arguments.runs_on_cpu", lambda use_cpu: use_cpu),
    ):
        yield


def work(folder: Path, cells: list[str]) -> None:
    """Measure in this process; the first one writes the figures."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from manipulators import PolicyTrainingArguments

    PolicyTrainingArguments(str(folder), use_cpu=True)  # makes the process group
    worker, found = Worker(folder), {}
    for case, cell in (cell.split("/") for cell in cells):
        found.setdefault(case, {})[cell] = getattr(worker, cell)(case, folder / f"{case}-{cell}")
    if os.environ["RANK"] == "0":
        (folder / "figures.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# --- in front of them -------------------------------------------------------------------------------------


def measure(folder: Path, cells: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure cells, each named `policy/cell`, in two processes, and return figures by policy and cell."""
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launch += ["--main_process_port", "0", __file__, "--work", str(folder), *cells]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads((folder / "figures.json").read_text())


def faults(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return what is wrong with the figures."""
    limits = {"weights": 1e-3, "loss": 1e-4, "share": 0.6, "loaded": 0.0}
    return [
        f"{case} {cell} {name}: {value}"
        for case, cells in figures.items()
        for cell, values in cells.items()
        for name, value in values.items()
        if not math.isfinite(value) or value > (0.0 if cell == "resume" else limits[name])
    ]


def table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the figures as Markdown."""
    cells = list(next(iter(figures.values())))
    lines = [f"| policy | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for case, values in figures.items():
        shown = [f"{v['weights']:.0e}" + (f", {v['share']:.0%}" if "share" in v else "") for v in values.values()]
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=POLICIES, help="policies")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # in the processes: folder and cells
    options = parser.parse_args()
    if options.work is not None:
        folder, *cells = options.work
        work(Path(folder), cells)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), [f"{case}/{cell}" for case in options.only for cell in options.cells])
    print(table(figures))
    for fault in faults(figures):
        print(fault, file=sys.stderr)
    return 1 if faults(figures) else 0


if __name__ == "__main__":
    sys.exit(main())
