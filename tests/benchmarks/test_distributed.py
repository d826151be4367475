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
    # Accumulation includes DDP; what accelerate, an unused parameter or a random state do is the same in every policy.
    cells = [f"{case}/{cell}" for case in distributed["POLICIES"] for cell in ("accumulate", "lora", "fsdp2")]
    cells += ["act_two_cameras/unused", "diffusion_two_cameras/resume", "gr00t_n1_5/resume"]
    cells += ["composed_act_flow_matching/trainer", "gr00t_n1_5/trainer", "pi0/trainer_lora"]
    return distributed["measure"](tmp_path_factory.mktemp("processes"), cells)


def test_every_policy_in_two_processes_equals_one_process(distributed, figures):
    assert list(figures) == list(distributed["POLICIES"])
    for case, cells in figures.items():
        assert {"accumulate", "lora", "fsdp2"} <= set(cells)
        for cell in set(cells) - {"resume"}:
            assert cells[cell]["weights"] < 2e-5, (case, cell)
            assert cells[cell].get("loss", 0.0) < 2e-5, (case, cell)


def test_fsdp2_halves_the_weights_and_saves_them_whole(figures):
    for case, cells in figures.items():
        assert 0.5 <= cells["fsdp2"]["share"] < 0.55, case
        saved = [values["loaded"] for values in cells.values() if "loaded" in values]
        assert saved and set(saved) == {0.0}, case
    assert all("loaded" in figures[case][cell] for case, cell in (("gr00t_n1_5", "trainer"), ("pi0", "trainer_lora")))


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(figures):
    for case in ("diffusion_two_cameras", "gr00t_n1_5"):
        assert figures[case]["resume"] == {"weights": 0.0, "loss": 0.0}


def test_what_is_wrong_is_found(distributed):
    figures = {"pi0": {"ddp": {"weights": 1e-6, "loss": 0.0}, "resume": {"weights": 1e-9, "loss": float("nan")}}}
    assert distributed["faults"](figures) == ["pi0 resume weights: 1e-09", "pi0 resume loss: nan"]
    assert distributed["table"](figures).splitlines()[-1] == "| pi0 | 1e-06 | 1e-09 |"
