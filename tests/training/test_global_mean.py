"""One mean over a step's batches: the same training, whatever batches and processes it is split into."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "train_in_processes.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def one_batch(script, tmp_path_factory):
    """What eight samples in one batch give."""
    return script["results"](script["build"](tmp_path_factory.mktemp("whole"), per_device_train_batch_size=8))


def compare(found, expected):
    for name in ("logged", "evaluated", "sums"):
        actual, wanted = torch.tensor(found[name]), torch.tensor(expected[name])
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_accumulated_batches_are_one_batch(script, one_batch, tmp_path):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3}
    compare(script["results"](script["build"](tmp_path, **sizes)), one_batch)


def test_batches_of_two_processes_are_one_batch(one_batch, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launch, SCRIPT, tmp_path, "2"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    compare(json.loads((tmp_path / "results.json").read_text()), one_batch)
