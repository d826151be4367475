"""The learning curve: which values it takes from a log, and the file it writes."""

import math
import subprocess
import sys

import pytest
from PIL import Image

from manipulators.errors import NothingToDrawError
from manipulators.hub_cards import learning_curve
from manipulators.hub_cards.learning_curve import draw_learning_curve, read_curves

LOG = [
    {"step": 10, "epoch": 0.5, "loss": 2.0, "l1": 0.8, "kl": 0.12, "learning_rate": 1e-5, "grad_norm": 3.0},
    {"step": 10, "eval_loss": 2.2, "eval_runtime": 1.0},
    {"step": 20, "epoch": 1.0, "loss": 0.5, "l1": 0.3, "kl": 0.02, "data_wait_share": 0.1},
    {"step": 20, "train_loss": 1.25, "train_runtime": 5025.0},
]


def test_loss_parts_and_evaluation_loss_are_read():
    assert read_curves(LOG) == {
        "loss": ([10, 20], [2.0, 0.5]),
        "l1": ([10, 20], [0.8, 0.3]),
        "kl": ([10, 20], [0.12, 0.02]),
        "eval_loss": ([10], [2.2]),
    }
    assert list(read_curves(LOG, parts=["loss", "kl"])) == ["loss", "kl", "eval_loss"]


def test_a_resumed_run_counts_once_and_bad_values_not_at_all():
    log = [
        {"step": 20, "loss": 9.0},
        {"step": 30, "loss": math.nan},
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 2.0, "l1": math.inf},
        {"loss": 1.0},
        {"step": 40, "loss": "1.0"},
    ]
    assert read_curves(log) == {"loss": ([10, 20], [3.0, 2.0])}


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 0.2], "linear"), ([1.0, 0.05], "log"), ([1.0, 0.05, 0.0], "log"), ([1.0, -0.01], "linear")],
)
def test_the_axis_is_logarithmic_beyond_one_decade(values, scale):
    curves = read_curves([{"step": step, "loss": value} for step, value in enumerate(values, 1)])
    assert learning_curve._figure(curves).axes[0].get_yscale() == scale


def test_the_picture_is_whole_and_repeatable(tmp_path):
    path = draw_learning_curve(LOG, tmp_path / "curve.png")
    first = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
    assert Image.open(path).size == (960, 504)
    assert draw_learning_curve(LOG, path).read_bytes() == first


def test_long_logs_are_smoothed():
    assert learning_curve._running_mean([1.0, 2.0, 6.0, 3.0], window=3) == [1.5, 3.0, 11 / 3, 4.5]
    curves = read_curves([{"step": step, "loss": 1.0 + step % 2} for step in range(1, 402)])
    raw, smooth = learning_curve._figure(curves).axes[0].get_lines()
    assert (raw.get_alpha(), smooth.get_alpha()) == (0.25, None)


@pytest.mark.parametrize("log", [[], [{"step": 20, "train_loss": 1.25}], [{"step": 1, "loss": math.nan}]])
def test_a_log_without_a_loss_is_refused(log, tmp_path):
    with pytest.raises(NothingToDrawError, match=f"The log has {len(log)} entries and none with a finite `loss`"):
        draw_learning_curve(log, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_rendering_a_card_loads_no_heavy_library():
    code = (
        "import sys, manipulators.hub_cards.card, manipulators.hub_cards.lint; "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
