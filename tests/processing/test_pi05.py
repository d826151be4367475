"""π0.5's prompts: the state as bins, beside the instruction."""

import logging
import runpy
from pathlib import Path

import pytest
import torch

from manipulators.processing.pi05 import PI05PolicyProcessor, state_bins
from manipulators.processing.word_tokenizer import word_tokenizer

CASES = runpy.run_path(str(Path(__file__).parents[1] / "policy_cases.py"))


def test_bins():
    """-1 below the first edge, 255 from the last one on, and no number rounded over an edge."""
    below, above = (torch.nextafter(torch.zeros(()), torch.tensor(x)).item() for x in (-1.0, 1.0))
    state = torch.tensor([[-2.0, -1.0, below, 0.0, above, 0.0078125, 0.9921875, 1.0, 2e6, -2e6]])
    assert state_bins(state).tolist() == [[-1, 0, 127, 128, 128, 129, 255, 255, 255, -1]]
    assert state_bins(torch.tensor([[-1.0 - 2**-23, 1.0 - 2**-7 - 2**-24]])).tolist() == [[-1, 254]]


@pytest.fixture
def processor():
    ends = {"q01": [0.0, 0.0, 5.0], "q99": [1.0, 2.0, 5.0]}
    statistics = {"observation.state": ends, "action": {"q01": [0.0] * 2, "q99": [1.0] * 2}}
    tokenizer = word_tokenizer(["push the button task state action : ; ,"])
    return PI05PolicyProcessor.from_config(CASES["tiny_pi05"](), statistics, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("state", "bins"),
    [([0.5, 2.0, 5.0], "128 255 0"), ([-0.1, 0.0, 5.001], "-1 0 255"), ([0.25, 1.0, 4.999], "64 128 -1")],
)
def test_prompt_of_a_normalised_state(processor, monkeypatch, state, bins):
    """Bins of the robot's three numbers, not of the padding; a number that never moved is in an end when it does."""
    prompts = []
    encode = type(processor.instruction).prompts
    monkeypatch.setattr(
        type(processor.instruction), "prompts", lambda *args: prompts.append(encode(*args)) or prompts[-1]
    )
    pictures = {f"observation.images.{name}": torch.zeros(3, 32, 32) for name in ("wrist", "above")}
    processor(pictures | {"observation.state": state}, task=" push_the\nbutton ")
    assert prompts == [[f"Task: push the button, State: {bins};\nAction: "]]


def test_mean_and_deviation():
    """Statistics of the other kind serve as well: the mean is in the middle."""
    config = CASES["tiny_pi05"](
        normalization_mapping={"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "IDENTITY"}
    )
    statistics = {
        "observation.state": {"mean": [1.0, 2.0, 3.0], "std": [2.0, 1.0, 0.0]},
        "action": {"mean": [0.0] * 2, "std": [1.0] * 2},
    }
    processor = PI05PolicyProcessor.from_config(config, statistics, tokenizer=word_tokenizer(["push"]))
    state = processor.encode("observation.state", torch.tensor([[1.0, 1.5, 3.0], [2.0, 9.0, 3.1]]))
    assert state_bins(state[:, :3]).tolist() == [[128, 64, 128], [192, 255, 255]]


def test_what_is_cut_off_is_said(processor, caplog, monkeypatch):
    """The instruction stands first, so a long one costs the end of the state."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rest = len(processor.tokenizer("Task: , State: 128 128 128;\nAction: ")["input_ids"])
    state = {"state": torch.zeros(1, 6)}
    processor.instruction.tokens("push " * (24 - rest), 1, state)
    assert "it is cut" not in caplog.text
    processor.instruction.tokens("push " * (25 - rest), 1, state)
    assert "it is cut to max_instruction_tokens=24, so the policy does not see its end" in caplog.text
