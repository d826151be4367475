"""The comparison with LeRobot, as far as it runs without: what is drawn, what is said, and what counts as agreeing."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from manipulators.conversion.published_policy import published_policies
from manipulators.errors import InvalidConfigError
from manipulators.processing.registry import processor_class

POLICIES = ("act", "diffusion", "pi0")
SEEDS = range(12)


@pytest.fixture(autouse=True)
def agreement(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import agreement

    return agreement


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_is_a_configuration(agreement, policy):
    drawn = [agreement.draw(policy, seed) for seed in SEEDS]
    assert drawn == [agreement.draw(policy, seed) for seed in SEEDS]
    assert len({json.dumps(configuration.config) for configuration in drawn}) == len(SEEDS)
    again = agreement.draw(policy, 3)
    for name, values in drawn[3].statistics().items():
        assert {which: x.tolist() for which, x in values.items()} == {
            which: x.tolist() for which, x in again.statistics()[name].items()
        }
    name = drawn[3].observed[0]
    values = drawn[3].values(name, (2,), 0)
    assert np.array_equal(values, again.values(name, (2,), 0))
    assert not np.array_equal(values, again.values(name, (2,), 1))
    assert drawn[3].tasks(2, 0) == again.tasks(2, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_drawn_can_be_built(agreement, policy):
    """Or is refused by the name of an option that is drawn for this purpose."""
    (kind,) = (kind for kind in published_policies() if kind.lerobot_type == policy)
    built = 0
    for seed in SEEDS:
        configuration = agreement.draw(policy, seed)
        try:
            fields = kind.fields(configuration.config, {}) | agreement.own_fields(configuration)
            config = kind.policy_class.config_class.from_dict(fields)
        except InvalidConfigError as error:
            assert configuration.rare is not None and configuration.rare in str(error)
            continue
        if policy == "pi0":
            continue  # its processor needs a tokenizer
        processor = processor_class(config).from_config(config, configuration.statistics())
        leading = (1,) if configuration.history == 1 else (1, configuration.history)
        observation = {name: configuration.values(name, leading, 0) for name in configuration.observed}
        inputs = processor(observation)
        assert all(torch.isfinite(x).all() for x in inputs.values() if isinstance(x, torch.Tensor))
        built += 1
    assert policy == "pi0" or built > len(SEEDS) // 2


def test_padding_repeats_the_last_real_action(agreement):
    configuration = agreement.draw("diffusion", 1)
    configuration.padding = [0, 1, configuration.horizon]
    actions, is_pad = configuration.labels(0)
    assert is_pad.sum(axis=1).tolist() == [0, 1, configuration.horizon]
    assert np.array_equal(actions[1, -1], actions[1, -2]) and not np.array_equal(actions[0, -1], actions[0, -2])
    assert (actions[2] == actions[2, 0]).all()


def test_differences(agreement):
    of = agreement.Difference.of
    found = of(torch.tensor([1.0, 3.5]), torch.tensor([1.0, 4.0]))
    assert (found.absolute, found.relative) == (0.5, 0.125)
    assert of(torch.tensor([1e-9]), torch.tensor([0.0]), floor=1e-3).relative == pytest.approx(1e-6)
    for other in (torch.tensor([math.nan]), torch.zeros(2)):
        assert of(torch.zeros(1), other).relative == math.inf


def run(agreement, monkeypatch, capsys, *arguments):
    """Call the program and return its exit code and what it prints."""
    monkeypatch.setattr(sys, "argv", ["agreement.py", *map(str, arguments)])
    try:
        code = agreement.main()
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_without_lerobot(agreement, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "find_spec", lambda name: None)
    code, printed = run(agreement, monkeypatch, capsys, "--policy", "act")
    assert code == 2 and "pip install --no-deps lerobot==0.6.1" in printed


def test_the_exit_code_and_the_seed_that_differs(agreement, monkeypatch, capsys, tmp_path):
    """Refused by name is no disagreement; a difference, an error and a number that is missing are."""
    quantities = agreement.TOLERANCES

    def compare(configuration, folder):
        result = agreement.Result(configuration, {name: agreement.Difference(1e-7, 1e-7) for name in quantities})
        if configuration.seed == 3:
            result.differences["gradients"] = agreement.Difference(1.0, 0.5, "head.weight")
        if configuration.seed == 2:
            result.differences, result.refused = {}, "rtc_config is not known"
        if configuration.seed == 4:
            del result.differences["loss"]
        return result

    monkeypatch.setattr(agreement, "find_spec", lambda name: True)
    monkeypatch.setattr(agreement, "machine", lambda packages: {"python": "3.12"})
    monkeypatch.setattr(agreement, "compare", compare)
    threads = torch.get_num_threads()
    try:
        code, printed = run(agreement, monkeypatch, capsys, "--policy", "act", "--count", 5, "--output", tmp_path)
        good, _ = run(agreement, monkeypatch, capsys, "--policy", "act", "--count", 3, "--output", tmp_path / "good")
        alone, _ = run(agreement, monkeypatch, capsys, "--policy", "act", "--seed", 4)
    finally:
        torch.set_num_threads(threads)
    assert (code, good, alone) == (1, 0, 1)
    table = (tmp_path / "agreement.md").read_text()
    assert table in printed and "act 3: DIFFERS; --policy act --seed 3" in printed
    (row,) = (line for line in table.splitlines() if line.startswith("| act |"))
    assert row.startswith("| act | 5 | 2 | 1 |") and row.endswith("(`head.weight`) | `--policy act --seed 3` |")
    assert "Refused: act 2: refused by name: rtc_config is not known" in table
    results = json.loads((tmp_path / "agreement.json").read_text())["results"]
    assert [result["configuration"]["seed"] for result in results] == [0, 1, 2, 3, 4]
