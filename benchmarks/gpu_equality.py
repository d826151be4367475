"""Equal numbers on a GPU: every tiny policy of the tests beside itself on the CPU, and beside the goldens."""

from __future__ import annotations

import copy
import json
import runpy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_rows import Row, Suite, keep_traceback
from safetensors.torch import load_file
from torch import nn

from manipulators import AutoPolicy, GR00TN1_5Config, GR00TN1_5Policy, PolicyPipeline, load_published
from manipulators.conversion.act import rename_act_weights
from manipulators.conversion.diffusion import rename_diffusion_weights
from manipulators.inference.speed import example_request
from manipulators.modeling.policy import LABELS, PolicyModel
from manipulators.modeling.stages import stages_of
from manipulators.processing.processor import PolicyProcessor
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

TESTS = Path(__file__).parents[1] / "tests"
CASES = runpy.run_path(str(TESTS / "policy_cases.py"))["CASES"]
TASK = "push the red button"
EQUAL = 1e-4  # largest difference in float32 over the largest number: other kernels add in another order
ROUNDED = 0.1  # the same in bfloat16
PUBLISHED = ("act_vae_2cam_tiny", "act_prenorm_novae", "act_envstate", "old033_act_envstate")
PUBLISHED += ("diffusion_envstate", "diffusion_ddim", "diffusion_crop")
_compiled: set[tuple[type, str]] = set()  # methods of which torch holds compiled code


class Difference(NamedTuple):
    """How far two results lie apart: at most, and over the largest number of what was expected."""

    absolute: float
    relative: float


def difference(found: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Return how far two tensors lie apart: infinitely where shapes differ or a number is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return Difference(float("inf"), float("inf"))
    most = (found - expected).abs().max().item() if found.numel() else 0.0
    return Difference(most, most / max(expected.abs().max().item() if found.numel() else 0.0, 1e-12))


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return tensors, in lists and dictionaries too, on a device; those of floating point in a type if given."""
    if isinstance(value, Mapping):
        return {name: moved(x, device, dtype) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [moved(x, device, dtype) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)


def statistics_of(config: Any) -> dict[str, dict[str, list[float]]]:
    """Return statistics of every kind for each feature, other ones per dimension but for the same deviation."""
    starts = {"mean": 0.1, "min": -2.0, "max": 1.0, "q01": -1.5, "q99": 0.75, "q10": -1.0, "q90": 0.5}

    def of(width: int) -> dict[str, list[float]]:
        rising = {kind: [start + 0.25 * i for i in range(width)] for kind, start in starts.items()}
        return rising | {"std": [0.5] * width}

    features = config.input_features | config.output_features
    return {name: of(feature.shape[0]) for name, feature in features.items()}


def processor_of(config: Any) -> PolicyProcessor:
    """Return the processor of a policy, with a tokenizer of a few words where it reads any."""
    words = {"tokenizer": word_tokenizer([TASK])} if config.reads_instruction else {}
    return processor_class(config).from_config(config, statistics_of(config), **words)


# --- a tiny policy beside itself --------------------------------------------------------------------------


class Twins:
    """A tiny policy on the CPU and its copy on the device, and the same inputs for both.

    Args:
        config: of the policy.
        device: of the copy.
    """

    def __init__(self, config: Any, device: torch.device):
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.cpu: PolicyModel = AutoPolicy.from_config(config).eval()
        with torch.no_grad():
            for parameter in self.cpu.parameters():  # none keeps an initial zero, behind which errors would hide
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.there = self.copy()

    def copy(self) -> PolicyModel:
        """Return a copy on the device."""
        return copy.deepcopy(self.cpu).to(self.device)

    def given(self, batch: int, draws: bool = True) -> dict[str, Any]:
        """Return an observation on the CPU, with draws that make sampling a function of it."""
        inputs = self.config.example_inputs(batch)
        observation = {name: value for name, value in inputs.items() if name not in LABELS}
        return observation | (self.config.example_draws(batch) if draws else {})


def chunk(twins: Twins) -> dict[str, Difference]:
    """Compare chunks, also of the fused policy."""
    given = twins.given(2)
    expected, inputs = twins.cpu.predict_action_chunk(**given), moved(given, twins.device)
    return {
        "chunk": difference(twins.there.predict_action_chunk(**inputs), expected),
        "fused": difference(twins.copy().fuse().predict_action_chunk(**inputs), expected),
    }


def gradients(twins: Twins) -> dict[str, Difference]:
    """Compare loss and gradients of a training step whose every draw is given."""
    given = twins.config.example_inputs(2) | twins.config.example_draws(2, training=True)
    losses, slopes = [], []
    for policy, inputs in ((copy.deepcopy(twins.cpu), given), (twins.copy(), moved(given, twins.device))):
        for module in policy.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        loss = policy(**inputs).loss
        loss.backward()
        losses.append(loss)
        slopes.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    expected, found = slopes
    if expected.keys() != found.keys():
        raise RuntimeError(f"gradients of other parameters: {sorted(expected.keys() ^ found.keys())[:5]}")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    most = max(difference(found[name], gradient).absolute for name, gradient in expected.items())
    return {"loss": difference(losses[1], losses[0]), "gradients": Difference(most, most / largest)}


def bfloat16(twins: Twins) -> dict[str, Difference]:
    """Compare a chunk in bfloat16 with that in float32, both on the device."""
    inputs = moved(twins.given(2), twins.device)
    rounded = twins.copy().to(torch.bfloat16)
    found = rounded.predict_action_chunk(**moved(inputs, twins.device, torch.bfloat16))
    return {"bfloat16": difference(found, twins.there.predict_action_chunk(**inputs))}


def seeded(twins: Twins) -> dict[str, Difference]:
    """Sample twice by the device's generator, and once by the CPU's on either device."""
    given = twins.given(2, draws=False)
    inputs = moved(given, twins.device)

    def sample(policy: PolicyModel, inputs: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        return policy.predict_action_chunk(**inputs, generator=torch.Generator(device).manual_seed(3))

    first, second = (sample(twins.there, inputs, twins.device) for _ in range(2))
    of_cpu = sample(twins.there, inputs, "cpu")
    return {"seeded": difference(second, first), "CPU's seed": difference(of_cpu, sample(twins.cpu, given, "cpu"))}


def batches(twins: Twins) -> dict[str, Difference]:
    """Compare each sample of a batch with the sample alone."""
    inputs = moved(twins.given(3), twins.device)
    together = twins.there.predict_action_chunk(**inputs)
    apart = torch.cat([twins.there.predict_action_chunk(**sample_of(inputs, i)) for i in range(3)])
    return {"batch": difference(apart, together)}


def sample_of(inputs: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return sample i of a batch, still as a batch; what is drawn in every step has the batch behind the steps."""

    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of(name, x) for x in value]
        return value.narrow(1 if name == "step_noise" else 0, i, 1)

    return {name: of(name, value) for name, value in inputs.items()}


def reloaded(twins: Twins) -> dict[str, Difference]:
    """Save on the device; load, moved there afterwards and loaded there at once, and compare chunks."""
    inputs = moved(twins.given(2), twins.device)
    expected = twins.there.predict_action_chunk(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        twins.there.save_pretrained(folder)
        loaded = AutoPolicy.from_pretrained(folder).to(twins.device)
        there = AutoPolicy.from_pretrained(folder, device_map=str(twins.device))
        return {
            "reloaded": difference(loaded.predict_action_chunk(**inputs), expected),
            "device_map": difference(there.predict_action_chunk(**inputs), expected),
        }


def pipeline(twins: Twins) -> dict[str, Difference]:
    """Compare actions from raw observations, over two chunks, with those of a pipeline on the CPU."""
    actions = []
    for policy, device in ((twins.cpu, "cpu"), (twins.there, twins.device)):
        acting = PolicyPipeline(model=policy, processor=processor_of(twins.config), device=device)
        observation, _ = example_request(acting, 2)
        task = [TASK] * 2 if twins.config.reads_instruction else None
        generator = torch.Generator().manual_seed(4)
        steps = range(twins.config.n_action_steps + 1)
        current = {name: x if twins.config.n_obs_steps == 1 else x[:, 0] for name, x in observation.items()}
        actions.append(torch.stack([acting(current, task, generator=generator) for _ in steps]))
    return {"pipeline": difference(actions[1], actions[0])}


CHECKS: tuple[Callable[[Twins], dict[str, Difference]], ...] = (
    chunk,
    gradients,
    bfloat16,
    seeded,
    batches,
    reloaded,
    pipeline,
)


def equal_case(suite: Suite, case: str) -> dict[str, Any]:
    """Make every check of a case; one that fails does not keep the others from being made."""
    twins = Twins(CASES[case].config(), suite.device)
    found: dict[str, Difference] = {}
    failed: list[str] = []
    for check in CHECKS:
        try:
            found |= check(twins)
        except Exception as error:
            failed.append(f"{check.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            keep_traceback(suite.output, f"equal {case} {check.__name__}")
    return judged(found, failed)


def judged(found: dict[str, Difference], failed: list[str]) -> dict[str, Any]:
    """Return a row's numbers: the relative differences, with all of them, and with what failed."""
    limits = {name: ROUNDED if name == "bfloat16" else EQUAL for name in found}
    numbers: dict[str, Any] = {name: f"{d.relative:.0e}" for name, d in found.items()}
    numbers["differences"] = {name: d._asdict() for name, d in found.items()}
    numbers["ok"] = not failed and all(d.relative <= limits[name] for name, d in found.items())
    return numbers | ({"failed": "; ".join(failed)} if failed else {})


# --- beside the goldens -----------------------------------------------------------------------------------


def published_golden(suite: Suite, folder: Path) -> dict[str, Difference]:
    """Compare chunk, loss and gradients with those of LeRobot's ACT or Diffusion Policy."""
    inputs, outputs = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    acting = PolicyPipeline.from_pretrained(folder / "checkpoint", device=suite.device)

    def group(*prefixes: str) -> dict[str, torch.Tensor]:
        named = ((name.partition("/"), value) for name, value in inputs.items())
        return {name: value for (prefix, _, name), value in named if prefix in prefixes}

    def observation(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in values.items() if name.startswith("observation.")}

    given = group("chunk")
    draws = {"noise": given.get("noise_init"), "step_noise": given.get("noise_steps")}
    draws = moved({name: value for name, value in draws.items() if value is not None}, suite.device)
    prepared = acting.prepare(observation(given))
    found = {
        "chunk": difference(acting.policy.predict_action_chunk(**prepared, **draws), outputs["chunk/action_norm"]),
        "actions": difference(acting.predict_chunk(observation(given), **draws), outputs["chunk/action"]),
    }
    case = json.loads((folder / "case.json").read_text())
    if "train/grad_norm" not in outputs:
        return found
    raw = group("train", "train_u8")
    labels = {"actions": raw["action"], "action_is_pad": raw["action_is_pad"]}
    batch = moved(dict(acting.processor(observation(raw), **labels)), suite.device)
    names = {"noise": "eps", "time": "timesteps", "crop_offsets": "crop_ij"}
    draws = moved({ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}, suite.device)
    loss = acting.policy.train()(**batch, **draws).loss
    loss.backward()
    rename = rename_act_weights if acting.policy.config.model_type == "act_policy" else rename_diffusion_weights
    expected = rename(case["grad_norms"])
    norms = {name: p.grad.norm().item() for name, p in acting.policy.named_parameters() if p.grad is not None}
    most = max(abs(norms.get(name, 0.0) - norm) for name, norm in expected.items())
    return found | {
        "loss": difference(loss.reshape(-1), outputs["train/loss"].reshape(-1)),
        "gradients": Difference(most, most / max(expected.values())),
    }


def pi0_golden(suite: Suite, folder: Path) -> dict[str, Difference]:
    """Compare chunk, actions and loss with those of LeRobot's π0."""
    sizes = runpy.run_path(str(TESTS / "parity" / "test_pi0.py"))["sizes"]
    case = json.loads((folder / "case.json").read_text())
    inputs, outputs = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    loading = sizes(case["config"]) | {"tokenizer": folder / "tokenizer"}
    acting = PolicyPipeline.from_pretrained(folder / "checkpoint", device=suite.device, **loading)
    observation = {name: x for name, x in inputs.items() if name.startswith("observation.")}
    draws = moved({name: inputs[name] for name in ("noise", "time")}, suite.device)
    labelled = acting.processor(observation, task=case["tasks"], actions=inputs["action"])
    with torch.no_grad():
        loss = acting.policy(**moved(dict(labelled), suite.device), **draws).loss
    prepared = acting.prepare(observation, case["tasks"])
    found = acting.policy.predict_action_chunk(**prepared, noise=draws["noise"])
    normalised = outputs["chunk_normalized"]
    actions = acting.predict_chunk(observation, task=case["tasks"], noise=draws["noise"])
    return {
        "chunk": difference(found[..., : normalised.shape[-1]], normalised),
        "actions": difference(actions, outputs["chunk"]),
        "loss": difference(loss.reshape(-1), outputs["loss"].reshape(-1)),
    }


def gr00t_golden(suite: Suite, folder: Path) -> dict[str, Difference]:
    """Compare chunk and loss of a padded batch with those of NVIDIA's GR00T N1.5."""
    slots = runpy.run_path(str(TESTS / "parity" / "test_gr00t_n1_5.py"))["SLOTS"]
    case = json.loads((folder / "case.json").read_text())["config"]
    weights, outputs = (load_file(folder / f"{kind}.safetensors") for kind in ("weights", "outputs"))
    given = moved(load_file(folder / "inputs.safetensors"), suite.device)
    config = GR00TN1_5Config(**case, embodiment_ids=slots, attention_implementation="sdpa", loss_over="steps")
    policy = load_published(GR00TN1_5Policy(config).eval(), weights).to(suite.device)
    inputs = {
        "pixel_values": given["eagle_pixel_values"].unflatten(0, (2, 2)),
        "input_ids": given["eagle_input_ids"],
        "attention_mask": given["eagle_attention_mask"],
        "state": given["state"],
        "embodiment_id": given["embodiment_id"],
    }
    labels = {"actions": given["action"], "action_mask": given["action_mask"], "noise": given["noise"]}
    with torch.no_grad():
        loss = policy(**inputs, **labels, time=(0.999 - given["beta_sample"]) / 0.999).loss
    found = policy.predict_action_chunk(**inputs, noise=given["inference_init_noise"])
    return {
        "chunk": difference(found, outputs["action_pred_fa2_emulated"]),
        "loss": difference(loss.reshape(-1), outputs["loss_fa2_emulated"].reshape(-1)),
    }


GOLDENS: dict[str, Callable[[Suite, Path], dict[str, Difference]]] = {
    **dict.fromkeys(PUBLISHED, published_golden),
    "pi0_lerobot_ckpt": pi0_golden,
    "gr00t_n1_5_policy_tiny": gr00t_golden,
}


def equal_golden(suite: Suite, name: str) -> dict[str, Any]:
    """Compare with one golden, where its folder is there."""
    folder = suite.golden / name
    if not folder.is_dir():
        return {"skipped": f"there is no {folder}"}
    return judged(GOLDENS[name](suite, folder), [])


# --- compiled ---------------------------------------------------------------------------------------------


def compile_options(mode: str, on_gpu: bool) -> dict[str, Any]:
    """Return keywords of `compile` for a mode, compiled or graphs; the modules are not looked at in every call.

    Where there is no GPU only torch's own tracing is tried, since compiling for a CPU takes minutes.
    """
    if not on_gpu:
        return {"backend": "eager"}
    options: dict[str, Any] = {"triton.cudagraphs": mode == "graphs"}
    unguarded = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
    return {"options": options | ({"guard_filter_fn": unguarded} if unguarded is not None else {})}


def forget_others(policy: PolicyModel) -> None:
    """Forget what was compiled for another policy with the same stages: without guards it would serve this one too."""
    own = {(type(owner), name) for owner, name in stages_of(policy).values()}
    if own & _compiled:
        torch._dynamo.reset()
        _compiled.clear()
    _compiled.update(own)


def graph_skips() -> int:
    """Return how often torch has left out CUDA graphs that it was asked for."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def other_numbers(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of the same shapes whose numbers with a point have the other sign."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(x) for x in value]
        return -value if value.is_floating_point() else value.clone()

    return {name: of(value) for name, value in inputs.items()}


def equal_compiled(suite: Suite, case: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Compare chunks of a compiled policy with those before: for its inputs, for others, and for its own once more."""
    twins = Twins(CASES[case].config(), suite.device)
    forget_others(twins.there)
    policy, first = twins.there, moved(twins.given(1), suite.device)
    second = other_numbers(first)
    expected = [policy.predict_action_chunk(**inputs) for inputs in (first, second)]
    before = graph_skips()
    policy.compile(inputs=first, **(options if suite.on_gpu else {"backend": "eager"}))
    chunks = [policy.predict_action_chunk(**inputs) for inputs in (first, second, first)]
    found = {
        "chunk": difference(chunks[0], expected[0]),
        "other input": difference(chunks[1], expected[1]),
        "again": difference(chunks[2], expected[0]),
    }
    numbers = judged(found, []) | {"graphs skipped": graph_skips() - before}
    return numbers | {"ok": numbers["ok"] and not numbers["graphs skipped"]}


# --- rows -------------------------------------------------------------------------------------------------


def equality_rows() -> list[Row]:
    """Return a row per tiny policy."""
    return [Row(f"equal {case}", 1.5, partial(equal_case, case=case)) for case in CASES]


def golden_rows() -> list[Row]:
    """Return a row per golden."""
    return [Row(f"golden {name}", 1.5, partial(equal_golden, name=name)) for name in GOLDENS]


def compiled_rows(on_gpu: bool) -> list[Row]:
    """Return a row per kind of policy as CUDA graphs, and then one compiled without them."""
    complete = [name for name, case in CASES.items() if case.complete]
    modes = {"reduce-overhead": {"mode": "reduce-overhead"}, "default": {}} if on_gpu else {"traced": {}}
    return [
        Row(f"compiled {case}, {mode}", 20, partial(equal_compiled, case=case, options=options))
        for mode, options in modes.items()
        for case in complete
    ]
