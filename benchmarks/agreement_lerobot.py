"""LeRobot's side of agreement.py: a policy of a drawn configuration, its checkpoint folder, and what it computes."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement_draws import ACTION, STATE, Configuration, Draws, gradient_of, in_type
from lerobot.configs import PreTrainedConfig
from lerobot.policies import pi_gemma
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import NormalizerProcessorStep, tokenizer_processor
from pi0_lerobot import build
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class LeRobot:
    """LeRobot's policy of a configuration between its two processors, with random weights and statistics.

    Args:
        configuration: what to build.
        folder: where its checkpoint is saved, as LeRobot saves it.
        words: for the tokenizer of a policy that reads instructions.
    """

    def __init__(self, configuration: Configuration, folder: Path, words: tuple[str, ...]):
        self.configuration = configuration
        (folder / "config.json").write_text(json.dumps(configuration.config))
        config = PreTrainedConfig.from_pretrained(folder)
        torch.manual_seed(configuration.seed)
        policy_class = get_policy_class(configuration.policy)
        if configuration.sizes is None:
            self.policy = policy_class(config)
        else:
            _take_todays_masks()
            modeling = inspect.getmodule(policy_class)
            self.policy = build(configuration.sizes, lambda: policy_class(config), modeling)
        _vary(self.policy)
        self.tokenizer = word_tokenizer(words)
        with _tokenizer(self.tokenizer):
            statistics = {n: _tensors(values) for n, values in configuration.statistics().items()}
            self.before, self.after = make_pre_post_processors(config, dataset_stats=statistics)
        if configuration.normalize_only is not None:
            (normalizer,) = (step for step in self.before.steps if isinstance(step, NormalizerProcessorStep))
            normalizer.normalize_observation_keys = set(configuration.normalize_only)
        for part in (self.policy, self.before, self.after):
            part.save_pretrained(folder)

    def batch(self, size: int, draw: int, labels: bool = False) -> dict[str, Any]:
        """Return a batch as LeRobot's data loader gives it."""
        steps = self.policy.config.observation_delta_indices
        leading = (size,) if steps is None else (size, len(steps))
        batch: dict[str, Any] = {"task": self.configuration.tasks(size, draw)}
        for name in self.configuration.observed:
            x = torch.from_numpy(self.configuration.values(name, leading, draw))
            batch[name] = x.movedim(-1, -3).float() / 255 if x.dtype == torch.uint8 else x
        batch.setdefault(STATE, torch.zeros(*leading, 1))  # ACT asks it for its device, also where it has none
        if labels:
            batch[ACTION], batch["action_is_pad"] = map(torch.from_numpy, self.configuration.labels(draw))
        return batch

    def chunk(self, size: int, draw: int, draws: Draws) -> torch.Tensor:
        """Return a normalised chunk (b, h, a) for a batch."""
        self.policy.reset()
        batch = self.before(self.batch(size, draw))
        with scripted(self.policy, draws):
            return self.policy.eval().predict_action_chunk(batch)

    def actions(self, observations: list[dict[str, np.ndarray]], tasks: list[str], draws: list[Draws]) -> torch.Tensor:
        """Return the actions (steps, a) of an episode in robot units, as LeRobot's robot loop takes them."""
        self.policy.eval().reset()
        taken = []
        for observation, task, drawn in zip(observations, tasks, draws, strict=True):
            prepared = prepare_observation_for_inference(dict(observation), torch.device("cpu"), task)
            prepared.setdefault(STATE, torch.zeros(1, 1))
            prepared = self.before(prepared)
            with scripted(self.policy, drawn, all_of_them=False):
                taken.append(self.after(self.policy.select_action(prepared))[0])
        return torch.stack(taken)

    def loss_and_gradients(self, size: int, draw: int, draws: Draws, dtype: torch.dtype) -> tuple[torch.Tensor, Draws]:
        """Return the training loss of a batch and the gradients under LeRobot's names, computed in that type."""
        batch = in_type(self.before(self.batch(size, draw, labels=True)), dtype)
        self.policy.to(dtype).train().zero_grad()
        for layer in self.policy.modules():  # its ACT fills the latent with zeros in float32, whatever its own type
            if isinstance(layer, nn.Linear) and dtype is torch.float64:
                layer.register_forward_pre_hook(lambda layer, inputs: in_type(list(inputs), layer.weight.dtype)[0])
        with scripted(self.policy, draws):
            loss, _ = self.policy(batch)
        loss.backward()
        return loss.detach(), {name: gradient_of(p) for name, p in self.policy.named_parameters()}


@contextmanager
def scripted(policy: nn.Module, draws: Draws, all_of_them: bool = True) -> Iterator[None]:
    """Give LeRobot these numbers where it draws its own.

    Args:
        policy: LeRobot's.
        draws: `noise`, `step_noise`, `time` and `crop_offsets`, as our policies take them.
        all_of_them: whether every number has to be drawn; not where actions may still be queued.

    Raises:
        RuntimeError: LeRobot draws other shapes, more or less.
    """
    normal = [draws["noise"], *draws.get("step_noise", ())] if "noise" in draws else []
    whole = [offset.reshape(1) for offset in draws.get("crop_offsets", torch.empty(0)).flatten()]
    times = [draws["time"]] if "time" in draws else []
    flows = hasattr(getattr(policy, "model", None), "sample_noise")
    if not flows:
        whole, times = whole + times, []

    def take(queue: list[torch.Tensor], shape: Any) -> torch.Tensor:
        if not queue or queue[0].shape != torch.Size(shape):
            raise RuntimeError(f"LeRobot draws numbers of shape {tuple(shape)}, which are not expected: {queue[:1]}.")
        return queue.pop(0).clone()

    def randn(*sizes: Any, size: Any = None, **kwargs: Any) -> torch.Tensor:
        size = sizes if size is None else size
        return take(normal, size[0] if isinstance(size[0], (tuple, list)) else size)

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "randn", randn),
        (torch, "randn_like", lambda like, **kwargs: take(normal, like.shape)),
        (torch, "randint", lambda *bounds, size=None, **kwargs: take(whole, size)),
    ]
    if flows:
        replaced += [
            (policy.model, "sample_noise", lambda shape, device: take(normal, shape)),
            (policy.model, "sample_time", lambda size, device: take(times, (size,))),
        ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in originals:
            if owner is torch:
                setattr(owner, name, function)
            else:
                delattr(owner, name)
    if all_of_them and (left := normal + whole + times):
        raise RuntimeError(f"LeRobot did not draw {len(left)} of the numbers.")


def word_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words that, like PaliGemma's, begins with <bos> and has a token for a line break."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(("<pad>", "<unk>", "<bos>", *words, "\n")))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\n|[^\s]+"), "removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>")


@contextmanager
def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give LeRobot's processors this tokenizer, whichever they name: PaliGemma's is gated."""
    original = tokenizer_processor.AutoTokenizer

    class Local:
        from_pretrained = staticmethod(lambda name, **kwargs: tokenizer)

    tokenizer_processor.AutoTokenizer = Local
    try:
        yield
    finally:
        tokenizer_processor.AutoTokenizer = original


def _take_todays_masks() -> None:
    """Drop the argument `cache_position`, which LeRobot's Gemma still gives, where transformers no longer takes it."""
    original = inspect.unwrap(pi_gemma.create_causal_mask)
    if "cache_position" in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def create(*args: Any, cache_position: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    pi_gemma.create_causal_mask = create


def _vary(policy: nn.Module) -> None:
    """Move norms, biases and statistics of batch norms off the ones and zeros at which they start."""
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            kind = name.rpartition(".")[2]
            if kind == "running_var":
                tensor.uniform_(0.5, 1.5)
            elif kind == "running_mean" or (tensor.ndim == 1 and tensor.is_floating_point()):
                tensor.add_(0.1 * torch.randn(tensor.shape))


def _tensors(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}
