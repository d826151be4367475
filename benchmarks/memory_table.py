"""The memory of every policy at published size, computed: inference, adapters, full fine-tuning.

    python benchmarks/memory_table.py                     # all rows, some minutes, less than 4 GB of memory
    python benchmarks/memory_table.py --only 'pi0*'

Nothing is allocated: the real code runs on tensors without memory (torch's fake tensors), forwards and, in training,
backwards too, while the bytes of all tensors alive are counted; the highest sum is the peak. Weights, gradients, two
moments of AdamW each, averaged weights and activations are among them; what a GPU's kernels, its context (0.5 GB) and
the allocator take beyond are not. In 8 and 4 bits the bytes of the layers that are quantised are replaced: 1 byte a
weight and 4 a row (bitsandbytes), 0.5 bytes and 4 for 64 weights (nf4), and one layer at a time in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from networks import act_config, diffusion_config, gr00t_config, gr00t_n1_config, pi0_config, pi05_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.initialization import no_init_weights

from manipulators import AutoPolicy, PolicyModel, PolicyTrainingArguments
from manipulators.modeling.quantization import plain_dtype
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.tuning import apply_tuning

CAMERAS = 3
PARTS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model")
BYTES = {"int8": (1.0, 4.0), "4bit": (0.5 + 4 / 64, 0.0)}  # of a weight, of a row
GB = 1e9


@dataclass(frozen=True)
class Training:
    """How a policy is trained: a shipped recipe, or a batch size alone.

    Args:
        title: for the table.
        recipe: its settings are taken.
        batch: samples at a time, where no recipe says it.
        lora: every part of the policy gets an adapter, where no recipe says what is trained.
        ema: averaged weights are kept.
    """

    title: str
    recipe: str | None = None
    batch: int = 8
    lora: bool = False
    ema: bool = False


def _lora(batch: int) -> Training:
    return Training(f"LoRA on all parts, batch {batch}", batch=batch, lora=True)


POLICIES: dict[str, tuple[Callable[[], Any], list[Training]]] = {
    "act": (lambda: act_config("published"), [_lora(8), Training("full, batch 8")]),
    "diffusion": (
        lambda: diffusion_config("published", "DDIM", 10),
        [_lora(64), Training("full with averaged weights, batch 64", batch=64, ema=True)],
    ),
    "pi0": (
        lambda: pi0_config("published", CAMERAS),
        [Training("`pi0_lora_24gb`", "pi0_lora_24gb"), Training("`pi0_full`", "pi0_full")],
    ),
    "pi05": (
        lambda: pi05_config("published", CAMERAS),
        [Training("as `pi0_lora_24gb`", "pi0_lora_24gb"), Training("as `pi0_full`", "pi0_full")],
    ),
    "gr00t_n1": (
        lambda: gr00t_n1_config("published", CAMERAS),
        [
            Training("`gr00t_n1_lora_24gb`", "gr00t_n1_lora_24gb"),
            Training("`gr00t_n1_head_only`", "gr00t_n1_head_only"),
            Training("full, batch 8", batch=8),
        ],
    ),
    "gr00t_n1_5": (
        lambda: gr00t_config("published", CAMERAS),
        [
            Training("`gr00t_n1_5_lora_24gb`", "gr00t_n1_5_lora_24gb"),
            Training("`gr00t_n1_5_head_only`", "gr00t_n1_5_head_only"),
            Training("full, batch 8", batch=8),
        ],
    ),
}


# --- counting ---------------------------------------------------------------------------------------------


class AliveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operators return, until nobody holds them any more."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count the memory behind a tensor, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: object) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def without_memory(policy: PolicyModel, mode: FakeTensorMode) -> None:
    """Replace every weight by one without memory, of the type that loading gives it."""
    with mode:
        for prefix, module in policy.named_modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    # peft keeps its layers in float32.
                    own = torch.float32 if "lora_" in prefix else plain_dtype(policy, f"{prefix}.{name}")
                    empty = torch.empty(value.shape, dtype=own)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
            for name, value in list(module._buffers.items()):
                if value is not None and value.is_meta:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def build(config: Any, dtype: str) -> PolicyModel:
    """Return a policy whose weights are on the meta device, where its construction allows that."""
    config.dtype = dtype
    on_meta = config.model_type not in ("act_policy", "diffusion_policy")
    with torch.device("meta") if on_meta else contextlib.nullcontext(), no_init_weights():
        policy = AutoPolicy.from_config(config)
    policy.config.dtype = dtype
    return policy


def inputs_of(policy: PolicyModel, mode: FakeTensorMode, batch: int, training: bool) -> dict[str, Any]:
    """Return model inputs and draws without memory; floats have the policy's type."""
    config = policy.config
    inputs = config.example_inputs(batch) | config.example_draws(batch, training=training)
    if not training:
        inputs = {
            name: value for name, value in inputs.items() if name not in ("actions", "action_is_pad", "action_mask")
        }
    dtype = getattr(torch, config.dtype)
    with mode:
        return tree_map_only(
            torch.Tensor,
            lambda value: mode.from_tensor(value).to(dtype if value.is_floating_point() else value.dtype),
            inputs,
        )


@contextlib.contextmanager
def counted(policy: PolicyModel, mode: FakeTensorMode) -> Iterator[AliveBytes]:
    """Yield a counter that knows the policy's weights. Checks that look into numbers are left out: there are none."""
    with mode, mock.patch("torch.compiler.is_compiling", lambda: True):
        counter = AliveBytes()
        for value in (*policy.parameters(), *policy.buffers()):
            counter.add(value)
        with counter:
            yield counter


# --- rows -------------------------------------------------------------------------------------------------


def inference(config: Any, dtype: str) -> tuple[int, dict[str, int]]:
    """Return the peak of predicting a chunk, batch 1, and by how much fewer bits change it."""
    policy, mode = build(config, dtype).eval(), FakeTensorMode(allow_non_fake_inputs=True)
    policy.requires_grad_(False)
    without_memory(policy, mode)
    inputs = inputs_of(policy, mode, 1, training=False)
    with counted(policy, mode) as counter, torch.no_grad():
        policy.predict_action_chunk(**inputs)
    layers = [layer for part in policy.quantizable.values() for layer in part.modules() if type(layer) is nn.Linear]
    saved = {}
    for bits, (of_weight, of_row) in BYTES.items() if layers else ():
        stored = sum(layer.weight.numel() * of_weight + layer.out_features * of_row for layer in layers)
        one = max(2 * layer.weight.numel() for layer in layers)
        saved[bits] = int(stored + one - sum(layer.weight.nbytes for layer in layers))
    return counter.peak, saved


def training(config: Any, how: Training) -> int:
    """Return the peak of two batches of forward and backward beside gradients and the optimizer's moments."""
    recipe = None if how.recipe is None else load_recipe(how.recipe)
    policy = build(config, "float32" if recipe is None else recipe.dtype or "float32")
    settings = {} if recipe is None else recipe.training
    arguments = PolicyTrainingArguments("unused", use_cpu=True, report_to="none", **_tuning(policy, how, settings))
    policy.freeze_parts()
    policy.config._name_or_path = "published"  # of an adapter's base; nothing is read from there
    tuned = {part: getattr(arguments, part) for part in PARTS if getattr(arguments, part) is not None}
    # An adapter records a digest of its base's numbers; here there are none.
    with mock.patch("manipulators.modeling.adapters.fingerprint", lambda *_: "none"):
        apply_tuning(policy, tuned, r=arguments.lora_rank, lora_alpha=arguments.lora_alpha)
    if settings.get("gradient_checkpointing"):
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_memory(policy.train(), mode)
    inputs = inputs_of(policy, mode, settings.get("per_device_train_batch_size", how.batch), training=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.get("bf16")))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with counted(policy, mode) as counter:
        kept = [torch.empty_like(parameter) for parameter in trained for _ in range(2 + how.ema)]
        for _ in range(2):  # the second beside the gradients of the first
            with autocast:
                loss = policy(**inputs).loss
            loss.backward()
            del loss
        del kept
    return counter.peak


def _tuning(policy: PolicyModel, how: Training, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is trained, as arguments of a training."""
    if how.recipe is not None:
        names = (*PARTS, "lora_rank", "lora_alpha")
        return {name: settings[name] for name in names if name in settings}
    value = "lora" if how.lora else True
    present = [part for part in PARTS if policy.part_modules(part)]
    return {part: value for part in present if not how.lora or part in policy.lora_targets}


def rows_of(name: str) -> Iterator[str]:
    """Yield the rows of a policy."""
    config, trainings = POLICIES[name]
    plain, _ = inference(config(), "float32")
    half, saved = inference(config(), "bfloat16")
    shown = {"float32": plain, "bfloat16": half} | {bits: half + less for bits, less in saved.items()}
    cells = [f"{shown[kind] / GB:.2f}" if kind in shown else "–" for kind in ("float32", "bfloat16", *BYTES)]
    yield f"| {name} | inference, batch 1 | {' | '.join(cells)} | |"
    for how in trainings:
        yield f"| {name} | {how.title} | | | | | {training(config(), how) / GB:.1f} |"


def main() -> None:
    """Print the table, a row as soon as it is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of policies, * for any text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| policy | what | float32 | bfloat16 | int8 | 4bit | training |\n|---|---|---|---|---|---|---|", flush=True)
    for name in POLICIES:
        if fnmatch.fnmatchcase(name, arguments.only):
            for row in rows_of(name):
                print(row, flush=True)


if __name__ == "__main__":
    main()
