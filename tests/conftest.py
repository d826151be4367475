"""Shared fixtures, and one hook that lets pytest run from a root that is itself a package."""

import importlib.util
import os
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
POLICY_CASES = runpy.run_path(str(Path(__file__).with_name("policy_cases.py")))


class _RootIsAFolder:
    """Collect the repository root as a plain folder: pytest would import its `__init__.py` a second time."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(_RootIsAFolder(), "root-is-a-folder")


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch):
    """Modules that a test names as plugins are not named in the commands of another test's records."""
    monkeypatch.setattr("manipulators.plugins._requested", {})


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and lose much where several programs share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and sample data beside the repository; its absence fails in CI and skips elsewhere."""
    if not SHARED.is_dir():
        reason = f"reference data not found at {SHARED}: it is handed out beside the repository, not inside it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


@pytest.fixture(scope="session")
def tiny_act():
    """Return the function that builds a tiny `ACTConfig`; see policy_cases.py."""
    return POLICY_CASES["tiny_act"]


@pytest.fixture(scope="session")
def tiny_diffusion():
    """Return the function that builds a tiny `DiffusionConfig`; see policy_cases.py."""
    return POLICY_CASES["tiny_diffusion"]


@pytest.fixture(scope="session")
def tiny_pi0():
    """Return the function that builds a tiny `PI0PolicyConfig`; see policy_cases.py."""
    return POLICY_CASES["tiny_pi0"]


@pytest.fixture(scope="session")
def tiny_pi05():
    """Return the function that builds a tiny `PI05PolicyConfig`; see policy_cases.py."""
    return POLICY_CASES["tiny_pi05"]


@pytest.fixture(scope="session")
def tiny_gr00t_n1_5():
    """Return the function that builds a tiny `GR00TN1_5Config`; see policy_cases.py."""
    return POLICY_CASES["tiny_gr00t_n1_5"]


@pytest.fixture(scope="session")
def tiny_gr00t_n1():
    """Return the function that builds a tiny `GR00TN1Config`; see policy_cases.py."""
    return POLICY_CASES["tiny_gr00t_n1"]


class Broken(NamedTuple):
    """Weights that are all broken, and what must be reported: names, and for another shape the two shapes too."""

    found: dict
    missing: list
    unexpected: list
    mismatched: list

    def check(self, error):
        assert error.missing == self.missing
        assert error.unexpected == self.unexpected
        assert error.mismatched == self.mismatched
        for name in (self.missing[0], self.unexpected[0], self.mismatched[0][0]):
            assert name in str(error)


@pytest.fixture(scope="session")
def break_all():
    """Return a function: weights → each of them broken in one of four ways, in another one every turn.

    Where they are loaded under other names, `ours` gives them.
    """

    def broken(weights, turn=0, ours=lambda name: name):
        found, missing, unexpected, mismatched = {}, [], [], []
        for i, (name, value) in enumerate(sorted(weights.items())):
            way = ("dropped", "renamed", "reshaped", "shortened")[(i + turn) % 4]
            if way in ("dropped", "renamed"):
                missing.append(ours(name))
            if way == "renamed":
                found[name + "_old"] = value
                unexpected.append(ours(name + "_old"))
            elif way != "dropped":
                found[name] = value.new_zeros(*value.shape, 2) if way == "reshaped" else value.flatten()[1:].clone()
                mismatched.append((ours(name), tuple(found[name].shape), tuple(value.shape)))
        return Broken(found, sorted(missing), sorted(unexpected), sorted(mismatched))

    return broken


@pytest.fixture(scope="session")
def statistics_of():
    """Return the function that makes statistics for a config; see policy_cases.py."""
    return POLICY_CASES["statistics_of"]


@pytest.fixture(scope="session")
def processor_of():
    """Return the function that builds the processor of a config's policy; see policy_cases.py."""
    return POLICY_CASES["processor_of"]


@pytest.fixture(scope="session")
def bitsandbytes():
    """The library that quantises, one of the test requirements; its absence fails in CI and skips elsewhere."""
    if importlib.util.find_spec("bitsandbytes") is None:
        reason = "bitsandbytes is not installed: pip install 'manipulators[quantization]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return importlib.import_module("bitsandbytes")
