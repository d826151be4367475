"""The GPU's suite: tried whole without a GPU, and how its rows keep to their time and out of each other's way."""

import glob
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CASES = ("act_two_cameras", "diffusion_two_cameras", "pi0", "gr00t_n1_5", "gr00t_n1")


def test_every_kind_of_row_runs_at_tiny_size(tmp_path, shared, monkeypatch):
    """Of the rows of compiled policies one: test_stages.py traces them all."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_suite import all_rows

    rows = [row.name for row in all_rows(on_gpu=False)]
    compiled = [row for row in rows if row.startswith("compiled ")]
    assert {f"compiled {case}, traced" for case in CASES} <= set(compiled)
    wanted = [row for row in rows if row not in compiled[1:]]
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--size", "tiny", "--device", "cpu"]
    command += ["--dtype", "float32", "--golden", str(shared / "golden"), "--output", str(tmp_path)]
    command += ["--only", *map(glob.escape, wanted)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"NO_COLOR": "1"})
    machine, *records = (json.loads(line) for line in (tmp_path / "gpu_suite.jsonl").read_text().splitlines())
    assert {record["row"]: record["numbers"] for record in records if record["result"] != "ok"} == {}
    assert result.returncode == 0, result.stderr[-2000:]
    assert machine["device"] == "cpu" and not (tmp_path / "errors").exists()
    names = [record["row"] for record in records]
    assert names == wanted and len(set(rows)) == len(rows)
    for line in (result.stdout.splitlines(), (tmp_path / "gpu_suite.md").read_text().splitlines()):
        assert [row.split(" | ")[0].removeprefix("| ") for row in line if " | ok | " in row] == names
    expected = {f"equal {case}" for case in CASES}
    expected |= {f"{policy}, 3 cameras, {mode}" for policy in ("π0", "GR00T N1.5") for mode in ("eager", "fused")}
    expected |= {"train pi0_lora_24gb", "train gr00t_n1_5_lora_24gb", "golden pi0_lerobot_ckpt", "ACT, eager"}
    assert expected <= set(names)


@pytest.fixture
def gpu_rows(monkeypatch):
    """The module that runs rows, with no time kept back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_rows

    monkeypatch.setattr(gpu_rows, "CLOSING", 0)
    return gpu_rows


@pytest.fixture
def run(gpu_rows, tmp_path):
    """Run rows within some seconds and return their records by name."""

    def run_rows(seconds, **functions):
        suite = gpu_rows.Suite(
            device=torch.device("cpu"),
            dtype=torch.float32,
            size="tiny",
            rounds=1,
            steps=1,
            golden=tmp_path,
            output=tmp_path,
            folder=tmp_path,
            deadline=time.monotonic() + seconds,
        )
        rows = [gpu_rows.Row(name, 100.0, function, "kept") for name, function in functions.items()]
        return {record["row"]: record for record in gpu_rows.run_rows(suite, rows, 0)}

    return run_rows


def test_the_recipes_run_on_recorded_episodes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import gpu_suite

    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--recipes", "--list", "--device", "cpu"])
    gpu_suite.main()
    names = [
        f"recipe {name}" for name in ("gr00t_n1_5_lora_24gb", "gr00t_n1_lora_24gb", "pi05_lora_24gb", "pi0_lora_24gb")
    ]
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()] == names
    rows = {row.name: row.run for row in gpu_suite.recorded_recipe_rows()}
    for record in run(600, **rows).values():
        assert record["result"] == "ok", record
        assert record["numbers"]["steps"] == 1 and record["numbers"]["samples/s"] > 0


def test_a_row_that_fails_leaves_its_traceback_and_the_next_one_runs(run, tmp_path):
    def fails(suite):
        raise ValueError("no such\nthing")

    records = run(
        60, fails=fails, stops=lambda suite: sys.exit("differs"), other=lambda suite: {"ms": 1.0, "all": [1]}
    )
    assert [record["result"] for record in records.values()] == ["FAILED", "FAILED", "ok"]
    assert records["fails"]["numbers"] == {"why": "ValueError: no such thing"}
    assert "raise ValueError" in (tmp_path / "errors" / "fails.txt").read_text()
    assert (tmp_path / "gpu_suite.md").read_text().endswith("| ms 1 |\n")


def test_a_row_that_takes_too_long_is_ended_and_what_does_not_fit_is_skipped(run):
    def endless(suite):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as libraries do
                continue

    records = run(0.3, endless=endless, late=lambda suite: {})
    assert records["endless"]["result"] == "FAILED" and "not done after 0 s" in records["endless"]["numbers"]["why"]
    assert records["late"]["result"] == "skipped"


def test_what_rows_share_is_built_once_and_freed_behind_the_last(run):
    built, seen = [], []

    def uses(suite):
        seen.append(suite.keep("kept", lambda: built.append(True) or "network"))
        return {"ok": len(built) == 1}

    records = run(60, first=uses, second=uses)
    assert seen == ["network", "network"] and all(record["result"] == "ok" for record in records.values())
