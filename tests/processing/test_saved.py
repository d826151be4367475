"""Processors that an earlier version saved load, give the numbers they gave, and are saved again as they were."""

import json
from pathlib import Path

import pytest
import torch

from manipulators import PolicyProcessor
from manipulators.processing.gr00t import GR00TN1_5Processor, GR00TN1Processor
from manipulators.processing.language import LanguageProcessor
from manipulators.processing.pi0 import PI0PolicyProcessor

SAVED = Path(__file__).parent / "saved"
CLASSES = {
    "act": PolicyProcessor,
    "diffusion": LanguageProcessor,
    "gr00t_n1": GR00TN1Processor,
    "gr00t_n1_5": GR00TN1_5Processor,
    "pi0": PI0PolicyProcessor,
    "robots": PolicyProcessor,
}


@pytest.mark.parametrize("name", CLASSES)
def test_numbers(name):
    processor = CLASSES[name].from_pretrained(SAVED / name)
    case = json.loads((SAVED / name / "expected.json").read_text())
    observation = {
        feature: torch.tensor(value, dtype=torch.uint8 if "state" not in feature else torch.float64)
        for feature, value in case["observation"].items()
    }
    inputs = processor(observation, task=case.get("task"), actions=case["actions"])
    assert inputs.keys() == case["inputs"].keys()
    for feature, value in case["inputs"].items():
        assert torch.equal(inputs[feature], torch.tensor(value, dtype=inputs[feature].dtype)), feature
    state = observation["observation.state"]
    decoded = processor.decode_actions(torch.tensor(case["chunk"]), state=state)
    assert torch.equal(decoded, torch.tensor(case["decoded"]))


@pytest.mark.parametrize("name", CLASSES)
def test_saved_again(name, tmp_path):
    processor = CLASSES[name].from_pretrained(SAVED / name)
    processor.save_pretrained(tmp_path)
    before, after = ((folder / "processor_config.json").read_text() for folder in (SAVED / name, tmp_path))
    assert after == before.replace('"PI0Processor"', '"PI0PolicyProcessor"')  # a name that transformers took
