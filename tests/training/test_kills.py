"""Runs that are killed at random moments and started again equal those that nobody disturbed."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import manipulators

ROOT = Path(manipulators.__file__).parent


@pytest.fixture(scope="module")
def kills():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return runpy.run_path(str(ROOT / "benchmarks" / "kills.py"))


def test_killed_runs_end_like_undisturbed_ones():
    # Of its own process: the runs are forks, and this one has threads.
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "4", "--kills-each", "1"]
    command += ["--only", "0-workers-ema", "record", "evaluate", "convert", "convert-dataset"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {name: rest for name, *rest in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    killed, while_saving, runs, identical = rows["0-workers-ema"]
    assert (killed, identical) == ("4", "yes")
    assert int(runs) >= 1
    assert 0 <= int(while_saving) <= 4
    for name in ("record", "evaluate", "convert", "convert-dataset"):
        killed, runs, _, lost, identical = rows[name]
        assert (killed, lost, identical) == ("1", "0", "yes"), name
        assert int(runs) >= 1


def test_the_comparison_sees_every_bit(kills):
    differences = kills["differences"]
    one = {"w": torch.tensor([0.0, 1.0]), "log": [{"loss": 0.5}], "file": b"x"}
    assert differences(one, {"w": torch.tensor([0.0, 1.0]), "log": [{"loss": 0.5}], "file": b"x"}) == []
    assert differences(one, one | {"w": torch.tensor([-0.0, 1.0])}) == ["/w"]
    assert differences(one, one | {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}) == ["/w"]
    assert differences(one, one | {"w": torch.tensor([[0.0, 1.0]])}) == ["/w"]
    assert differences(one, one | {"log": [{"loss": 0.5000001}]}) == ["/log/0/loss"]
    assert differences(one, one | {"log": []}) == ["/log"]
    assert differences(one, one | {"file": b"y", "more": 1}) == ["/file", "/more"]
