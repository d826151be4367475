"""Every generic test runs once per entry of policy_cases.py."""

import copy
import functools
import runpy
from pathlib import Path

import pytest
import torch

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))["CASES"]


@pytest.fixture(scope="session")
def cases():
    """All cases by name."""
    return CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if case.complete])
def complete_case(request):
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if case.graph])
def graph_case(request):
    return CASES[request.param]


def built(case):
    """Return the policy of a case in eval mode, every parameter drawn and none left at its initial zero."""
    from manipulators import AutoPolicy

    torch.manual_seed(0)
    policy = AutoPolicy.from_config(case.config()).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.fixture(scope="session")
def build_anew():
    """Return a function: case → its policy, see `built`."""
    return built


@pytest.fixture(scope="session")
def build():
    """Return a function: case → a copy of its policy, which is built once: a copy takes less time."""
    once = functools.cache(built)
    return lambda case: copy.deepcopy(once(case))


@pytest.fixture
def policy(case, build):
    return build(case)


@pytest.fixture(scope="session")
def checkpoint(build, processor_of, tmp_path_factory):
    """Return a function: case → its policy and the folder that holds it, saved once; tests change copies."""

    @functools.cache
    def save(case):
        policy, folder = build(case), tmp_path_factory.mktemp("checkpoint")
        policy.save_pretrained(folder)
        processor_of(policy.config).save_pretrained(folder)
        return policy, folder

    return save
