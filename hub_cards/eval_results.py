"""The Hub's file of evaluation results, .eval_results/*.yaml.

Format: https://huggingface.co/docs/hub/eval-results
"""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from . import wording
from .card_data import EvaluationSummary

EVAL_RESULTS_FILE = ".eval_results/manipulators.yaml"


def eval_results(evaluation: EvaluationSummary) -> str:
    """Return an evaluation and those beside it as YAML: success rates in percent, by environment.

    The Hub reads `<family>/<task>` as the id of a benchmark; it shows the results of those that it knows.
    """
    entries = [_entry(each) for each in (evaluation, *evaluation.further)]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def _entry(evaluation: EvaluationSummary) -> EvalResultEntry:
    environment = wording.one_line(evaluation.environment)
    family_and_task, _, options = environment.partition("?")
    notes = [f"{evaluation.solved} of {evaluation.episodes} episodes in closed loop"]
    notes += [f"{evaluation.errors} ended in an error of the environment"] if evaluation.errors else []
    notes += [f"seeds {wording.seed_runs(evaluation.seeds)}"] if evaluation.seeds else []
    notes += [f"instruction: {wording.one_line(evaluation.task)}"] if evaluation.task else []
    notes += [f"environment: {environment}"] if options else []
    return EvalResultEntry(
        dataset_id=family_and_task,
        task_id=family_and_task.rpartition("/")[2] or "default",
        value=round(100 * float(evaluation.success_rate), 4),
        date=evaluation.date,
        notes="; ".join(notes),
    )
