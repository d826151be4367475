"""The learning curve of a card, drawn from the log of a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .._files import new_file
from ..errors import NothingToDrawError
from .wording import is_number

# Beside these and the names that match `_OTHER_*`, what stands next to a loss in the log is a part of it.
_NOT_LOSSES = {"loss", "step", "epoch", "learning_rate", "grad_norm", "total_flos", "num_input_tokens_seen"}
_OTHER_PREFIXES = ("eval_", "train_", "test_", "learning_rate", "lr_", "num_", "memory")
_OTHER_SUFFIXES = ("_lr", "_norm", "_per_second", "_runtime", "_seconds", "_time", "_share", "_flos")

# Okabe and Ito's colours, told apart by colour-blind readers too; the total loss comes first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_EVALUATION_COLOUR = "#444444"
_INK, _GRID = "#333333", "#E4E4E4"
_SMOOTH_FROM = 200  # with more points than this, a running mean is drawn over the pale raw curve
_DECADES = 5  # shown on a logarithmic axis below the largest value; a part may fall to almost nothing

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(log_history: Iterable[Mapping], parts: Iterable[str] | None = None) -> Curves:
    """Return (steps, values) of the loss, its parts and the evaluation loss, in this order.

    Where a run was resumed, the later entry of a step counts. Values that are not finite are left out.

    Args:
        log_history: entries such as `{"step": 10, "loss": 0.7, "l1": 0.5, "learning_rate": 1e-5}`.
        parts (`Iterable[str]`, *optional*): names of the loss parts; by default, whatever is logged beside a
            loss and is not known to be something else, such as a learning rate, a norm or a time.
    """
    wanted = None if parts is None else set(parts) - {"loss"}
    points: dict[str, dict[int, float]] = {"loss": {}}
    evaluation: dict[int, float] = {}
    for entry in log_history:
        step = entry.get("step")
        if not is_number(step):
            continue
        if is_number(entry.get("eval_loss")):
            evaluation[int(step)] = float(entry["eval_loss"])
        if not is_number(entry.get("loss")):
            continue
        for name, value in entry.items():
            part = _may_be_loss_part(name) if wanted is None else name in wanted
            if (name == "loss" or part) and is_number(value):
                points.setdefault(name, {})[int(step)] = float(value)
    if evaluation:
        points["eval_loss"] = evaluation
    ordered = {name: sorted(values.items()) for name, values in points.items() if values}
    return {name: ([step for step, _ in pairs], [value for _, value in pairs]) for name, pairs in ordered.items()}


def draw_learning_curve(log_history: Sequence[Mapping], path: str | Path, parts: Iterable[str] | None = None) -> Path:
    """Draw loss and loss parts over training steps as a PNG, 960 × 504 pixels.

    The axis is logarithmic when the values span more than one decade. The file appears whole or not at all.

    Args:
        log_history: `trainer.state.log_history`; entries without a loss are skipped.
        path: the PNG to write.
        parts: see `read_curves`.

    Raises:
        NothingToDrawError: when no entry has a finite loss.
    """
    curves = read_curves(log_history, parts)
    if "loss" not in curves:
        raise NothingToDrawError(len(log_history))
    figure = _figure(curves)
    with new_file(path) as beside:
        # Without matplotlib's version in it, the same log gives the same bytes.
        figure.savefig(beside, format="png", metadata={"Software": None})
    return Path(path)


def _figure(curves: Curves):
    # Imported here because it takes long, and the object interface because pyplot keeps global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.2), dpi=120, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    for rank, (name, (steps, values)) in enumerate(curves.items()):
        _draw(axes, name, steps, values, _COLOURS[rank % len(_COLOURS)])

    shown = [value for _, values in curves.values() for value in values]
    positive = [value for value in shown if value > 0]
    if positive and min(shown) >= 0 and max(positive) > 10 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, max(positive) / 10**_DECADES), top)
        narrow = max(positive) < 100 * min(positive)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(left=0)
    axes.set_xlabel("training step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK, ncols=min(len(curves), 4), loc="lower right",
                    bbox_to_anchor=(1, 1), borderaxespad=0.2)  # fmt: skip
    return figure


def _draw(axes, name: str, steps: list[int], values: list[float], colour: str) -> None:
    dots = "o" if len(steps) == 1 else None  # a line through one point would be invisible
    if name == "eval_loss":
        axes.plot(steps, values, color=_EVALUATION_COLOUR, linestyle="--", marker="o", markersize=3.5,
                  linewidth=1.3, label="evaluation loss")  # fmt: skip
        return
    width, label = (2.2, "total loss") if name == "loss" else (1.5, name)
    if len(values) > _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        values = _running_mean(values, window=max(5, len(values) // 50))
    front = 3 if name == "loss" else 2
    axes.plot(steps, values, color=colour, linewidth=width, marker=dots, label=label, zorder=front)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and its neighbours, `window` values at most; fewer at the ends."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _may_be_loss_part(name: str) -> bool:
    return not (name in _NOT_LOSSES or name.startswith(_OTHER_PREFIXES) or name.endswith(_OTHER_SUFFIXES))
