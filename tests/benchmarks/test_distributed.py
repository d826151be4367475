"""Every policy in two processes equals one process; `accelerate launch` starts them, with the shipped file for DDP."""

import runpy
from pathlib import Path

import pytest

import manipulators

SCRIPT = Path(manipulators.__file__).parent / "benchmarks" / "distributed.py"


@pytest.fixture(scope="module")
def distributed():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def figures(distributed, tmp_path_factory):
    # DDP alone is what accumulation does too, and an unused parameter is the same in every policy.
    few = distributed["measure"](tmp_path_factory.mktemp("few"), ["act_two_cameras"], ["unused"])
    cells = ["accumulate", "lora", "fsdp2", "trainer", "resume"]
    return few | distributed["measure"](tmp_path_factory.mktemp("all"), list(distributed["POLICIES"]), cells)
