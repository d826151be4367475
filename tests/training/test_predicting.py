"""What `predict` and `compute_metrics` are given: actions and labels, of every policy."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from manipulators import AutoPolicy, PolicyTrainer
from manipulators.errors import InvalidConfigError
from manipulators.training.collator import PolicyCollator

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))["CASES"]
COMPLETE = [name for name, case in CASES.items() if case.complete]


class Rows(torch.utils.data.Dataset):
    """The rows of a batch of model inputs."""

    def __init__(self, batch, count):
        self.batch, self.count = batch, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {n: [view[i] for view in x] if isinstance(x, list) else x[i] for n, x in self.batch.items()}


def stacked(rows):
    return {
        name: [torch.stack(views) for views in zip(*column, strict=True)]
        if isinstance(column[0], list)
        else torch.stack(column)
        for name, column in ((name, [row[name] for row in rows]) for name in rows[0])
    }


@pytest.fixture(scope="module", params=COMPLETE)
def policy(request):
    torch.manual_seed(0)
    return AutoPolicy.from_config(CASES[request.param].config())


@pytest.fixture
def make_trainer(policy, processor_of, make_arguments):
    """Build a trainer that evaluates a policy in batches of three."""

    def make(compute_metrics=None, **arguments):
        return PolicyTrainer(
            policy,
            make_arguments(per_device_eval_batch_size=3, **arguments),
            processor_of(policy.config),
            eval_dataset=Rows(policy.config.example_inputs(5), 5),
            data_collator=stacked,
            compute_metrics=compute_metrics,
        )

    return make


def test_metrics_of_predicted_actions(policy, make_trainer):
    seen = []

    def metrics(evaluated):
        seen.append(evaluated)
        return {"mse": float(np.mean((evaluated.predictions - evaluated.label_ids) ** 2))}

    trainer, inputs = make_trainer(metrics), policy.config.example_inputs(5)
    torch.manual_seed(3)
    results = trainer.evaluate()
    after = torch.rand(1)
    wanted = inputs["actions"][..., :2].numpy()
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (5, policy.config.action_horizon, 2)
    np.testing.assert_array_equal(seen[0].label_ids, wanted)
    assert results["eval_mse"] == pytest.approx(np.mean((seen[0].predictions - wanted) ** 2))
    # They are drawn by a seed, another one for each batch, and do not change what else is drawn.
    assert trainer.evaluate({"again": trainer.eval_dataset})["eval_again_mse"] == results["eval_mse"]
    np.testing.assert_array_equal(trainer.predict(trainer.eval_dataset).predictions, seen[0].predictions)
    assert trainer.processor.decode_actions(torch.from_numpy(seen[0].predictions), padded=False).shape == wanted.shape
    without = make_trainer()
    torch.manual_seed(3)
    assert without.evaluate()["eval_loss"] == results["eval_loss"]
    assert torch.equal(torch.rand(1), after)
    other = make_trainer(metrics, seed=7).evaluate()["eval_mse"]
    assert (other == results["eval_mse"]) is not bool(policy.config.example_draws(2))


def test_noise_on_the_words_is_refused_where_it_has_no_effect(policy, make_trainer):
    embedding = policy.get_input_embeddings()
    if embedding is None:
        with pytest.raises(InvalidConfigError, match=r"has no language model\. Leave it out"):
            make_trainer(neftune_noise_alpha=5.0)
        return
    if policy.config.model_type == "diffusion_policy":
        with pytest.raises(InvalidConfigError, match="has a language model that is frozen whole"):
            make_trainer(neftune_noise_alpha=5.0)
        return
    trainer, inputs = make_trainer(neftune_noise_alpha=5.0, max_steps=1), policy.config.example_inputs(4)
    seen = []
    handle = embedding.register_forward_hook(lambda module, _, words: seen.append(module.neftune_noise_alpha))
    trainer.train_dataset = Rows(inputs, 4)
    trainer.train()
    handle.remove()
    assert seen == [5.0] and embedding.weight.isfinite().all()


def test_padding_comes_with_the_labels(policy, make_trainer):
    trainer = make_trainer(label_names=["actions", "action_is_pad"])
    inputs = policy.config.example_inputs(5)
    inputs["action_is_pad"][4, 2:] = True
    actions, is_pad = trainer.predict(Rows(inputs, 5)).label_ids
    assert actions.shape == (5, policy.config.action_horizon, 2)
    assert np.argwhere(is_pad).tolist() == [[4, step] for step in range(2, policy.config.action_horizon)]


def test_metrics_of_one_batch_after_the_other(policy, make_trainer):
    sizes = []

    def metrics(evaluated, compute_result):
        sizes.append(tuple(evaluated.predictions.shape) + tuple(evaluated.label_ids.shape))
        return {"rows": sum(size[0] for size in sizes)} if compute_result else {}

    h = policy.config.action_horizon
    assert make_trainer(metrics, batch_eval_metrics=True).evaluate()["eval_rows"] == 5
    assert sizes == [(3, h, 2, 3, h, 2), (2, h, 2, 2, h, 2)]


def test_without_labels_there_are_predictions(policy, make_trainer):
    observation = {name: x for name, x in policy.config.example_inputs(5).items() if not name.startswith("action")}
    result = make_trainer().predict(Rows(observation, 4))
    assert result.predictions.shape == (4, policy.config.action_horizon, 2)
    assert result.label_ids is None and "test_loss" not in result.metrics


def test_plain_trainer_gives_actions_that_cost_nothing(make_policy, make_processor, make_dataset, tmp_path):
    policy = make_policy()
    shapes = []
    arguments = {"label_names": ["actions"], "remove_unused_columns": False, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        policy,
        TrainingArguments(str(tmp_path), disable_tqdm=True, **arguments),
        eval_dataset=make_dataset(5),
        data_collator=PolicyCollator(make_processor(policy)),
        compute_metrics=lambda found: shapes.append((found.predictions.shape, found.label_ids.shape)) or {},
    )
    trainer.evaluate()
    assert shapes == [((5, 4, 2), (5, 4, 2))]
