"""How fast a policy answers: what is timed, how often, and how it is told."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from manipulators import AutoPolicy, PolicyPipeline
from manipulators.cli import main
from manipulators.errors import InvalidEvaluationError
from manipulators.inference.speed import Speed, example_request, measure_speed
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))["CASES"]


@pytest.fixture(scope="session")
def pipeline_of(statistics_of):
    """Return a function: config → a pipeline with fresh weights."""

    def build(config):
        words = {"tokenizer": word_tokenizer(["pick up the object"])} if config.reads_instruction else {}
        processor = processor_class(config).from_config(config, statistics_of(config), **words)
        return PolicyPipeline(model=AutoPolicy.from_config(config), processor=processor, device="cpu")

    return build


def test_stages_of_a_policy_that_samples(pipeline_of, tiny_pi0):
    speed = measure_speed(pipeline_of(tiny_pi0()), rounds=3, warmup=1, num_steps=4)
    assert list(speed.stages) == ["processor", "vision", "prefix", "denoise", "rest", "decode"]
    assert len(speed.chunk) == 3
    for stage, rounds in speed.stages.items():
        assert [len(calls) for calls in rounds] == [4 if stage == "denoise" else 1] * 3, stage
        assert all(second > 0 for calls in rounds for second in calls), stage
    assert (speed.policy, speed.batch_size, speed.n_action_steps) == ("pi0_policy", 1, 5)
    assert speed.dtype == "float32" and speed.device.startswith("cpu")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.complete])
def test_stages_of_every_policy(pipeline_of, name):
    pipeline = pipeline_of(CASES[name].config())
    speed = measure_speed(pipeline, rounds=1, warmup=0, batch_size=2)
    assert list(speed.stages) == ["processor", *pipeline.policy.stages, "rest", "decode"]


def test_requests_are_always_the_same_and_fit(pipeline_of, tiny_diffusion):
    cameras = {"wrist": (3, 32, 32), "above": (3, 32, 64)}
    pipeline = pipeline_of(tiny_diffusion(cameras))
    (first, task), (second, _) = example_request(pipeline, 2), example_request(pipeline, 2)
    assert task is None
    shapes = {name: x.shape for name, x in first.items()}
    assert shapes == {
        "observation.images.wrist": (2, 2, 3, 32, 32),
        "observation.images.above": (2, 2, 3, 32, 64),
        "observation.state": (2, 2, 3),
    }
    assert all((first[name] == second[name]).all() for name in first)


def test_table():
    """Per call, per chunk and at the 95th percentile, in milliseconds; rates at the median."""
    speed = Speed(
        policy="pi0_policy",
        device="cpu, 2 threads",
        dtype="float32",
        batch_size=1,
        n_action_steps=50,
        chunk=[0.1, 0.2, 0.3],
        stages={"vision": [[0.05], [0.07], [0.06]], "denoise": [[0.01, 0.03], [0.02, 0.02], [0.02, 0.06]]},
    )
    assert speed.chunks_per_second == pytest.approx(5) and speed.actions_per_second == pytest.approx(250)
    assert speed.table().splitlines() == [
        "| stage | calls | p50 per call [ms] | p50 per chunk [ms] | p95 per chunk [ms] |",
        "|---|---|---|---|---|",
        "| vision | 1 | 60 | 60 | 69 |",
        "| denoise | 2 | 20 | 40 | 76 |",
        "| **chunk** | | | 200 | 290 |",
        "",
        "pi0_policy · cpu, 2 threads · float32 · batch 1 · 3 chunks: 5 Hz, or 250 actions per second with 50 executed "
        "of each",
    ]
    stored = json.loads(speed.to_json())
    assert stored["stages"]["denoise"][2] == [0.02, 0.06] and stored["actions_per_second"] == pytest.approx(250)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"batch_size": 0}, {"warmup": -1}])
def test_nothing_to_time(pipeline_of, tiny_act, changes):
    with pytest.raises(InvalidEvaluationError, match=f"{next(iter(changes))}="):
        measure_speed(pipeline_of(tiny_act()), **changes)


def test_command(pipeline_of, tiny_pi0, tmp_path, capsys, monkeypatch):
    pipeline_of(tiny_pi0()).save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # the compiler itself: test_stages.py
    arguments = ["--rounds", "2", "--warmup", "0", "--device", "cpu", "--dtype", "bfloat16", "--fuse", "--compile"]
    arguments += ["--output", str(tmp_path / "speed.json")]
    assert main(["benchmark", str(tmp_path / "checkpoint"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| denoise | 3 |" in printed
    assert "bfloat16 and float32 · batch 1 · 2 chunks:" in printed
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert len(stored["chunk"]) == 2 and stored["policy"] == "pi0_policy"
