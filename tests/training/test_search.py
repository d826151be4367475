"""Runs that build their policy themselves: `model_init`, and transformers' search over hyperparameters."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from manipulators import AutoPolicy, PolicyPipeline, PolicyTrainer
from manipulators.errors import CheckpointError, InvalidConfigError


class Trial(dict):
    """One choice of hyperparameters."""

    def __init__(self, number, values):
        super().__init__(values)
        self.number, self.params = number, values


class EveryChoice:
    """Stand for optuna, whose trials are these; `seen` holds what each run has done."""

    def __init__(self, choices, seen):
        self.choices, self.seen = choices, seen

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        runs = []
        for number, values in enumerate(self.choices[:n_trials]):
            trainer.objective = None
            trainer.train(trial=Trial(number, values))
            self.seen(trainer)
            runs.append(BestRun(str(number), trainer.compute_objective(trainer.evaluate()), values))
        return min(runs, key=lambda run: run.objective)


@pytest.fixture
def search(monkeypatch):
    """Return a function: trainer, choices, what to do after each run → the best run."""

    def search(trainer, choices, seen=lambda trainer: None):
        backend = lambda: EveryChoice(choices, seen)  # noqa: E731
        monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, backend)
        monkeypatch.setattr(transformers.integrations, "hp_params", dict)
        return trainer.hyperparameter_search(hp_space=dict, backend="optuna", n_trials=len(choices))

    return search


@pytest.fixture
def make_trainer(make_policy, make_processor, make_dataset, make_arguments):
    """Build a trainer whose every run begins with a new policy, `init` or the tiny one."""

    def make(init=None, **arguments):
        return PolicyTrainer(
            args=make_arguments(max_steps=2, **arguments),
            processor=make_processor(make_policy()),
            train_dataset=make_dataset(),
            eval_dataset=make_dataset(4, seed=2),
            model_init=init or (lambda: make_policy(use_vae=False, dropout=0.0)),
        )

    return make


def test_every_run_begins_with_a_new_policy(make_trainer):
    trainer = make_trainer(tune_projector=False)
    results = []
    for _ in range(2):
        trainer.train()
        results.append(trainer.model)
        assert not any(
            p.requires_grad for m in trainer.model.part_modules("tune_projector").values() for p in m.parameters()
        )
    first, second = (policy.state_dict() for policy in results)
    assert results[0] is not results[1]
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_search_gives_every_trial_its_own_arguments_and_folder(make_trainer, search, tmp_path):
    seen = []
    choices = [{"learning_rate": 1e-9}, {"learning_rate": 1e-2, "ema_decay": 0.5}]
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    best = search(trainer, choices, lambda trainer: seen.append((trainer.args.learning_rate, trainer.args.ema_decay)))
    assert seen == [(1e-9, None), (1e-2, 0.5)]
    assert best.run_id == "1" and best.hyperparameters == choices[1]
    folder = tmp_path / "run" / "run-1" / "checkpoint-2"
    assert PolicyPipeline.from_pretrained(folder, device="cpu").processor.statistics == trainer.processor.statistics
    assert (folder / "ema.safetensors").is_file() and not (
        tmp_path / "run" / "run-0" / "checkpoint-2" / "ema.safetensors"
    ).exists()


def test_search_over_ranks_of_lora(make_trainer, make_policy, search, tmp_path):
    make_policy().save_pretrained(tmp_path / "base")
    ranks = []

    def rank(trainer):
        ranks.append({p.shape[0] for n, p in trainer.model.named_parameters() if "lora_A" in n})

    trainer = make_trainer(lambda: AutoPolicy.from_pretrained(tmp_path / "base"), tune_diffusion_model="lora")
    search(trainer, [{"lora_rank": 2}, {"lora_rank": 3}], rank)
    assert ranks == [{2}, {3}]


def test_values_that_no_run_can_have_are_refused(make_trainer, search):
    for values in ({"lora_rank": 0}, {"ema_decay": 1.5}, {"tune_llm": "some"}):
        with pytest.raises(InvalidConfigError, match=next(iter(values))):
            search(make_trainer(), [values])


def test_a_policy_that_does_not_fit_is_refused_at_once(make_trainer, make_policy):
    with pytest.raises(CheckpointError, match="input_features differ"):
        make_trainer(lambda: make_policy(camera=True))
    with pytest.raises(InvalidConfigError, match="needs a policy, not SimpleNamespace"):
        make_trainer(lambda: SimpleNamespace())
