"""Averaged weights: their arithmetic, where they are used, and how they survive."""

import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from manipulators import AutoPolicy, PolicyTrainer, PolicyTrainingArguments
from manipulators.errors import CorruptFileError, InvalidConfigError, MissingFileError, WeightsMismatchError
from manipulators.training.ema import EMA_FILE, WeightAverage

BIAS = "action_head.action_head.bias"


@pytest.fixture
def make_trainer(make_policy, make_processor, make_dataset, make_arguments):
    """Build a trainer of a fresh tiny policy that averages its weights."""

    def make(policy=None, ema_decay=0.9, eval_dataset=None, callbacks=None, **arguments):
        model = make_policy(**policy or {})
        return PolicyTrainer(
            model,
            make_arguments(ema_decay=ema_decay, **arguments),
            make_processor(model),
            train_dataset=make_dataset(),
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return make


class EachStep(TrainerCallback):
    """Call a function after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def copy_of(policy):
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- arithmetic -------------------------------------------------------------------------------------------


def number(value, dtype=torch.float32):
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(torch.full((1, 1), float(value), dtype=dtype))
    return module


def follow(average, module, values):
    shown = []
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        average.update()
        shown.append(average.tensors["weight"].item())
    return shown


def test_the_average_by_hand():
    module = number(5.0)
    average = WeightAverage(module, decay=0.9999)  # power 0.75
    shown = follow(average, module, [1.0, 2.0, 4.0])
    first, second = 1 - 2**-0.75, 1 - 3**-0.75  # 0.40540, 0.56130
    assert shown[0] == 1.0  # the weights it was built with are forgotten
    assert shown[1] == pytest.approx(first * 1 + (1 - first) * 2)
    assert shown[2] == pytest.approx(second * shown[1] + (1 - second) * 4)
    assert (round(first, 5), round(second, 5)) == (0.4054, 0.56131)
    assert average.updates == 3


def test_the_decay_is_limited():
    module = number(0.0)
    shown = follow(WeightAverage(module, decay=0.5, power=1.0), module, [0.0, 8.0, 8.0])
    assert shown == [0.0, 4.0, 6.0]  # 1 − 1/2 both times: 1 − 1/3 is beyond the limit


def test_power_and_inv_gamma():
    module = number(0.0)
    shown = follow(WeightAverage(module, decay=0.9999, power=1.0, inv_gamma=3.0), module, [0.0, 4.0])
    assert shown[1] == pytest.approx(0.75 * 4)  # 1 − (1 + 1/3)^−1 = 1/4 of the old average


def test_steps_before_the_first_are_only_taken_over():
    module = number(0.0)
    shown = follow(WeightAverage(module, decay=0.5, power=1.0, update_after_step=2), module, [1.0, 2.0, 3.0, 5.0])
    assert shown == [1.0, 2.0, 3.0, 4.0]


def test_the_average_of_half_precision_weights_is_kept_in_float32():
    module = number(1.0, torch.bfloat16)
    average = WeightAverage(module, decay=0.999, power=100.0)
    follow(average, module, [1.0, 1.0])
    value = follow(average, module, [1.0078125])[0]  # the next number that bfloat16 has
    assert average.tensors["weight"].dtype == torch.float32
    assert value == pytest.approx(1 + 0.001 * 0.0078125, abs=1e-7)
    with average.applied():
        assert module.weight.dtype == torch.bfloat16
        assert module.weight.item() == 1.0
    assert module.weight.item() == 1.0078125


def test_frozen_parameters_and_buffers_are_left_alone():
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    module[0].bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.9)
    assert set(average.tensors) == {"0.weight", "1.weight", "1.bias"}
    module[1].running_mean.fill_(7.0)
    average.copy_to_weights()
    assert module[1].running_mean.item() == 7.0


def test_weights_come_back_after_an_error_and_after_nested_blocks():
    module = number(0.0)
    average = WeightAverage(module, decay=0.5, power=1.0)
    follow(average, module, [0.0, 8.0])
    with average.applied():
        with average.applied():
            assert module.weight.item() == 4.0
        assert module.weight.item() == 4.0
    assert module.weight.item() == 8.0
    with pytest.raises(KeyboardInterrupt), average.applied():
        raise KeyboardInterrupt
    assert module.weight.item() == 8.0


# --- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 must lie in \[0, 1\)"),
        ({"ema_decay": -0.1}, r"ema_decay=-0\.1"),
        ({"ema_power": 0.0}, r"ema_power=0\.0 must be greater than 0"),
        ({"ema_inv_gamma": -1.0}, r"ema_inv_gamma=-1\.0"),
        ({"ema_update_after_step": -1}, r"ema_update_after_step=-1"),
    ],
)
def test_impossible_arguments(tmp_path, arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        PolicyTrainingArguments(str(tmp_path), use_cpu=True, **arguments)


# --- training ---------------------------------------------------------------------------------------------


def test_a_finished_run_holds_and_saves_the_average_of_its_steps(make_trainer, tmp_path):
    seen = []
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(EachStep(lambda step: seen.append(trainer.model.get_parameter(BIAS).detach().clone())))
    trainer.train()
    average = seen[0]
    for t, weights in enumerate(seen[1:], start=1):
        decay = min(0.9, 1 - (1 + t) ** -0.75)
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(trainer.model.get_parameter(BIAS).detach(), average)
    assert not torch.equal(average, seen[-1])

    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert torch.equal(load_file(checkpoint / "model.safetensors")[BIAS], seen[-1])  # to go on with
    torch.testing.assert_close(load_file(checkpoint / EMA_FILE)[BIAS], average)
    trainer.save_model(str(tmp_path / "published"))
    torch.testing.assert_close(AutoPolicy.from_pretrained(tmp_path / "published").get_parameter(BIAS), average)
    assert not (tmp_path / "published" / EMA_FILE).exists()


def test_averaging_does_not_change_the_training(make_trainer, tmp_path):
    for name, decay in (("with", 0.9), ("without", None)):
        make_trainer(output=name, ema_decay=decay, save_strategy="steps", save_steps=4).train()
    one, other = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("with", "without"))
    assert_equal(one, other)


@pytest.mark.parametrize("interrupted", [2, 3, 5])
def test_resuming_equals_an_uninterrupted_run_to_the_bit(make_trainer, tmp_path, interrupted):
    options = {"max_steps": 10, "save_steps": 1, "save_strategy": "steps", "logging_steps": 3}
    whole = make_trainer(output="whole", **options)
    whole.train()
    name = f"checkpoint-{interrupted}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "half" / name)
    resumed = make_trainer(output="half", policy={"seed": 5}, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(copy_of(whole.model), copy_of(resumed.model))
    for file in ("model.safetensors", EMA_FILE):
        assert_equal(*(load_file(tmp_path / run / "checkpoint-10" / file) for run in ("whole", "half")))
    with safe_open(tmp_path / "half" / "checkpoint-10" / EMA_FILE, "pt") as file:
        assert file.metadata()["updates"] == "10"
    first, second = ([e for e in t.state.log_history if "loss" in e] for t in (whole, resumed))
    assert [e["step"] for e in first] == [3, 6, 9]
    timeless = [[{k: v for k, v in e.items() if k != "data_wait"} for e in log] for log in (first, second)]
    assert timeless[0] == timeless[1]  # also the entry whose steps were taken before and after


def test_a_finished_run_that_is_resumed_takes_no_further_step(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    again = make_trainer(max_steps=4, policy={"seed": 5})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_equal(copy_of(trainer.model), copy_of(again.model))
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_a_second_run_of_one_trainer_begins_a_new_average(make_trainer):
    trainer = make_trainer(max_steps=2, learning_rate=1e-30)  # too small to move a weight
    trainer.train()
    with torch.no_grad():
        trainer.model.get_parameter(BIAS).fill_(3.0)
    trainer.train()
    assert torch.equal(trainer.model.get_parameter(BIAS).detach(), torch.full((2,), 3.0))


# --- evaluation -------------------------------------------------------------------------------------------


def test_evaluation_uses_the_average_and_training_goes_on_with_its_own(make_trainer, make_dataset):
    options = {"policy": {"dropout": 0.0}, "max_steps": 3, "learning_rate": 0.05}
    before, during = {}, {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before[state.global_step] = copy_of(trainer.model)

        def on_evaluate(self, args, state, control, **kwargs):
            during[state.global_step] = copy_of(trainer.model)
            with trainer.averaged_weights():  # a closed-loop evaluation would open its own block
                assert_equal(copy_of(trainer.model), during[state.global_step])

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in before:
                assert_equal(copy_of(trainer.model), before[state.global_step])

    held_out = make_dataset(8, seed=2)
    trainer = make_trainer(eval_dataset=held_out, eval_strategy="steps", eval_steps=1, callbacks=[Look()], **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == len(during) == 3
    batch = trainer.data_collator(held_out.samples)
    for step, loss in enumerate(losses, start=1):
        trainer.model.load_state_dict(during[step])
        with torch.no_grad():
            assert trainer.model.eval()(**batch).loss.item() == pytest.approx(loss, rel=1e-4)
    assert not torch.equal(during[3][BIAS], before[3][BIAS])


def test_weights_come_back_when_an_evaluation_fails(make_trainer, make_dataset):
    class Fail(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            during.append(copy_of(trainer.model)[BIAS])
            raise RuntimeError("the simulator is gone")

    before, during = [], []
    trainer = make_trainer(
        eval_dataset=make_dataset(4, seed=2), eval_strategy="steps", eval_steps=2, callbacks=[Fail()]
    )
    trainer.add_callback(EachStep(lambda step: before.append(copy_of(trainer.model)[BIAS])))
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        trainer.train()
    assert torch.equal(trainer.model.get_parameter(BIAS), before[1])
    assert not torch.equal(during[0], before[1])


def test_the_best_checkpoints_average_is_published(make_trainer, make_dataset, tmp_path):
    def spoil(step):
        if step == 2:
            with torch.no_grad():
                trainer.model.get_parameter(BIAS).fill_(1e3)

    trainer = make_trainer(
        callbacks=[EachStep(spoil)],
        max_steps=3,
        eval_dataset=make_dataset(8, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best < 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"checkpoint-{best}"]
    average = load_file(tmp_path / "run" / f"checkpoint-{best}" / EMA_FILE)
    weights = dict(trainer.model.named_parameters())
    assert average.keys() == weights.keys()
    assert all(torch.equal(average[name], weights[name]) for name in average)
    assert math.isclose(trainer.evaluate()["eval_loss"], losses[best], rel_tol=1e-5)


# --- files that do not fit --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    return tmp_path / "run" / "checkpoint-1"


def resume(make_trainer, checkpoint, **arguments):
    make_trainer(max_steps=2, **arguments).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_average(make_trainer, checkpoint):
    (checkpoint / EMA_FILE).unlink()
    with pytest.raises(MissingFileError, match=r"holds no ema\.safetensors.*Resume without ema_decay"):
        resume(make_trainer, checkpoint)


def test_an_average_that_ends_is_said(make_trainer, checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr("manipulators.training.trainer.logger.warning", said.append)
    resume(make_trainer, checkpoint, ema_decay=None)
    assert len(said) == 1
    assert "pass ema_decay to go on with them" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(BIAS), rf"1 missing:\n    {BIAS}"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"1 unexpected:\n    extra"),
        (lambda tensors: tensors.update({BIAS: torch.zeros(3)}), rf"{BIAS}: found \(3,\), expected \(2,\)"),
    ],
)
def test_an_average_of_other_weights(make_trainer, checkpoint, change, message):
    tensors = load_file(checkpoint / EMA_FILE)
    change(tensors)
    save_file(tensors, checkpoint / EMA_FILE, metadata={"updates": "1"})
    with pytest.raises(WeightsMismatchError, match=message):
        resume(make_trainer, checkpoint)


@pytest.mark.parametrize("damage", ["truncated", "uncounted"])
def test_a_damaged_average(make_trainer, checkpoint, damage):
    path = checkpoint / EMA_FILE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    else:
        save_file(load_file(path), path)
    with pytest.raises(CorruptFileError, match=r"ema\.safetensors is not a readable"):
        resume(make_trainer, checkpoint)


def test_damaged_progress(make_trainer, checkpoint):
    (checkpoint / "progress.safetensors").write_bytes(b"{")
    with pytest.raises(CorruptFileError, match=r"progress\.safetensors"):
        resume(make_trainer, checkpoint)
