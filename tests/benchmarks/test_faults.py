"""Bad observations between good ones for every policy: a slice of `benchmarks/faults.py`."""

import runpy
import warnings
from pathlib import Path

import pytest

from manipulators.modeling import registry

CASES = runpy.run_path(str(Path(__file__).parents[1] / "policy_cases.py"))["CASES"]
POLICIES = [name for name, case in CASES.items() if case.complete]
OTHERS = ["act, ensembling", "act, bounded", "diffusion, an optional camera", "pi0, an adapter", "custom"]


@pytest.mark.parametrize("name", [*POLICIES, *OTHERS])
def test_nothing_foreign_is_raised_no_trace_is_left_and_nothing_unusual_is_unnamed(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    from faults import VARIANTS, fuzz

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and numpy's, of unusual arrays
        outcome = fuzz(VARIANTS[name](), 60)
    assert outcome.faults == []
    assert (outcome.foreign, outcome.traces, outcome.unnamed) == (0, 0, 0)
    assert outcome.refused > 20 and outcome.named > 5 and outcome.harmless > 2
