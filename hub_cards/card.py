"""Render model cards: the README.md of a policy on the Hub, from plain values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound

from .._files import write_text
from . import statements, wording
from .card_data import CardData, DatasetSummary, EvaluationSummary, Paper, TrainingSummary
from .edits import keep_edited, sign, was_edited
from .learning_curve import draw_learning_curve, read_curves

__all__ = [
    "CardData",
    "DatasetSummary",
    "EvaluationSummary",
    "Paper",
    "TrainingSummary",
    "card_with_tags",
    "render_card",
    "save_card",
]

CARD_FILE = "README.md"
LEARNING_CURVE_FILE = "learning_curve.png"
_TEMPLATE = "policy_card.jinja"

_jinja = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # Markdown, not HTML; values in table cells pass through `cell`
)
_jinja.filters.update(
    {
        name: getattr(wording, name)
        for name in (
            *("cell", "code", "code_cell", "count", "dimension_table", "escaped", "fenced", "in_html", "number"),
            *("python_literal", "without_local_paths", "size", "units"),
        )
    }
)


def render_card(card: CardData) -> str:
    """Return the README.md of a policy: YAML metadata for the Hub, then Markdown for people.

    The text carries a comment with a hash of itself, so that `was_edited` can tell a person's changes.
    """
    method = _method(card)
    curves = read_curves(card.log_history)
    body = _jinja.get_template(_TEMPLATE).render(
        card=card,
        method=method,
        kinds=wording.KINDS,
        title=statements.title(card),
        result=statements.result(card),
        base_model=_linked(card.base_model),
        dataset=_datasets(card.dataset),
        mixture_rows=_mixture_rows(card.dataset),
        has_cameras=any(e.is_camera for robot in (card, *card.robots.values()) for e in robot.inputs),
        has_curve="loss" in curves,
        learning_curve=LEARNING_CURVE_FILE,
        timing=statements.timing(card),
        python_example=wording.python_example(card),
        eval_command=statements.eval_command(card),
        training_rows=statements.training_rows(card),
        evaluation_rows=statements.evaluation_rows(card),
        further_rows=statements.further_rows(card),
        measured=statements.measured(card),
        video=statements.video(card),
        limits=statements.limits(card),
        versions=", ".join(wording.escaped(f"{name} {version}") for name, version in card.versions.items()),
    )
    body = re.sub(r"\n{3,}", "\n\n", body.strip())  # absent parts of the template leave blank lines
    return sign(f"---\n{_metadata(card).to_yaml()}\n---\n\n{body}\n")


def save_card(card: CardData, folder: str | Path) -> Path:
    """Write README.md and, when there is a log, its learning curve; leave a README.md that a person edited.

    Returns:
        `Path`: the README.md. Each file appears whole or not at all.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    existing = path.read_text(encoding="utf-8") if path.exists() else ""
    rendered = render_card(card)
    if keep_edited(existing, rendered) != rendered:
        return path
    curves = read_curves(card.log_history)
    if "loss" in curves:
        losses = set(card.training.losses) - {"loss"} if card.training else set()
        draw_learning_curve(card.log_history, folder / LEARNING_CURVE_FILE, parts=losses or None)
    write_text(path, rendered)
    return path


@dataclass
class _Method:
    """Hold what a card says about the method."""

    summary: str
    paper: Paper | None
    citation: str


def _method(card: CardData) -> _Method:
    """Return the card's own words about its method, completed by the fragment of its model type, if any."""
    fragment = None
    if f"{card.model_type}.jinja" != _TEMPLATE:
        # A model type without a fragment, such as a user's own policy, is a normal case.
        with suppress(TemplateNotFound):
            fragment = _jinja.get_template(f"{card.model_type}.jinja").make_module({"card": card})
    paper = getattr(fragment, "paper", None)
    return _Method(
        summary=card.summary.strip() or str(getattr(fragment, "summary", "")).strip(),
        paper=card.paper or (Paper(**paper) if paper else None),
        citation=card.citation.strip() or str(getattr(fragment, "citation", "")).strip(),
    )


def _metadata(card: CardData) -> ModelCardData:
    results = None
    if card.evaluation:
        environment = wording.one_line(card.evaluation.environment)
        results = [
            EvalResult(
                task_type="robotics",
                task_name="Robotics",
                dataset_type=environment,
                dataset_name=environment,
                dataset_args={"episodes": card.evaluation.episodes},
                metric_type="success_rate",
                metric_name="Success rate",
                metric_value=float(card.evaluation.success_rate),
            )
        ]
    datasets = [name for name in card.dataset.names if wording.is_hub_id(name)] if card.dataset else []
    return ModelCardData(
        library_name="manipulators",
        pipeline_tag="robotics",
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        base_model=card.base_model if wording.is_hub_id(card.base_model) else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=["robotics", wording.one_line(card.model_type), "imitation-learning"],
        model_name=card.repo_id.rpartition("/")[2] if card.repo_id else f"{card.policy_name} policy",
        eval_results=results,
    )


def card_with_tags(text: str, tags: Sequence[str]) -> str:
    """Return a card with further tags in its metadata; one of ours stays recognisable as unedited."""
    if not tags:
        return text
    edited = was_edited(text)
    changed = ModelCard(text, ignore_metadata_errors=True)
    present = changed.data.tags or []
    changed.data.tags = list(dict.fromkeys([*present, *map(wording.one_line, tags)]))
    return str(changed) if edited else sign(str(changed))


def _linked(name: str | None, folder: str = "") -> str:
    """Return a Markdown link for a Hub id, and what is fit to publish of any other name."""
    if not name:
        return ""
    if wording.is_hub_id(name):
        return f"[{name}](https://huggingface.co/{folder}{name})"
    return wording.cell(wording.public_name(name))


def _datasets(dataset: DatasetSummary | None) -> str:
    """Return the names of the datasets, each as a link where it is on the Hub."""
    return ", ".join(_linked(name, "datasets/") for name in dataset.names) if dataset else ""


def _mixture_rows(dataset: DatasetSummary | None) -> list[tuple[str, ...]]:
    """Return the cells of the table of a mixture's datasets."""

    def counted(value: int | None) -> str:
        return "" if value is None else wording.count(value)

    return [
        (
            _linked(part.name, "datasets/"),
            wording.code_cell(part.embodiment) if part.embodiment else "",
            "" if part.weight is None else wording.number(part.weight),
            "" if part.share is None else f"{wording.percent(part.share)} %",
            counted(part.episodes),
            counted(part.frames),
        )
        for part in (dataset.mixture if dataset else ())
    ]
