"""PolicyTrainer: losses and rates in the logs, checkpoints that load, resume that equals going on."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from manipulators import (
    AutoPolicy,
    DiffusionConfig,
    DiffusionPolicy,
    PolicyPipeline,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
)
from manipulators.configuration.crops import small_crops
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    DivergedTrainingError,
    DivergedWeightsError,
    FolderInUseError,
    InvalidConfigError,
    WeightsMismatchError,
    WeightsValueError,
)
from manipulators.hub_cards.checkpoint_card import describe_policy
from manipulators.training.collator import PolicyCollator

BIAS, WEIGHT = "action_head.action_head.bias", "action_head.action_head.weight"


@pytest.fixture
def make_trainer(make_policy, make_processor, make_dataset, make_arguments):
    """Build a trainer of a fresh tiny policy; `policy` holds what changes its config."""

    def make(policy=None, dataset=None, camera=False, eval_dataset=None, callbacks=None, **arguments):
        model = make_policy(camera=camera, **policy or {})
        dataset = dataset or make_dataset(camera=camera)
        return PolicyTrainer(
            model,
            make_arguments(**arguments),
            make_processor(model),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return make


def logged(trainer):
    """The log's entries about training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def forward_losses(policy):
    """Collect the losses of every training forward pass."""
    seen = []

    def remember(module, arguments, output):
        if module.training:
            seen.append({name: value.item() for name, value in output.losses.items()} | {"loss": output.loss.item()})

    policy.register_forward_hook(remember)
    return seen


def batch_of(trainer, size=12):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


# --- losses and logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_the_mean_of_each_loss_part(make_trainer, accumulation):
    trainer = make_trainer(
        policy={"kl_weight": 3.0},
        max_steps=7,
        logging_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    seen = forward_losses(trainer.model)
    trainer.train()
    assert len(seen) == 7 * accumulation
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [3, 6]
    for position, entry in enumerate(entries):
        window = seen[3 * accumulation * position : 3 * accumulation * (position + 1)]
        for name in ("l1", "kl", "loss"):
            assert entry[name] == pytest.approx(sum(step[name] for step in window) / len(window), rel=1e-4), name
        assert entry["loss"] == pytest.approx(entry["l1"] + 3 * entry["kl"], rel=1e-4)


def test_without_a_vae_there_is_no_kl(make_trainer):
    trainer = make_trainer(policy={"use_vae": False})
    trainer.train()
    assert len(logged(trainer)) == 4
    for entry in logged(trainer):
        assert "kl" not in entry
        assert entry["l1"] == pytest.approx(entry["loss"], rel=1e-5)


def test_a_step_of_fewer_batches_counts_as_one_step_in_every_part(make_trainer):
    # Three batches an epoch, two a step: the second step of each epoch has one batch only.
    trainer = make_trainer(
        policy={"use_vae": False, "dropout": 0.0}, max_steps=2, logging_steps=2, gradient_accumulation_steps=2
    )
    trainer.train()
    entry = logged(trainer)[0]
    assert entry["l1"] == pytest.approx(entry["loss"], rel=1e-4)


def test_evaluation_does_not_enter_the_training_parts(make_trainer, make_dataset):
    trainer = make_trainer(
        policy={"use_vae": False, "dropout": 0.0},
        eval_dataset=make_dataset(8, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=2,
    )
    trainer.train()
    for entry in logged(trainer):
        assert entry["l1"] == pytest.approx(entry["loss"], rel=1e-4)


def test_data_wait_is_a_share(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    shares = [entry["data_wait"] for entry in logged(trainer)]
    assert len(shares) == 3
    assert all(0 <= share <= 1 for share in shares)


def test_data_wait_tells_slow_data(make_trainer, make_dataset):
    class Slow(type(make_dataset())):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    trainer = make_trainer(dataset=Slow(make_dataset().samples), max_steps=3, logging_steps=3)
    trainer.train()
    assert 0.5 < logged(trainer)[0]["data_wait"] <= 1


def test_training_lowers_the_loss(make_trainer, make_dataset):
    trainer = make_trainer(
        policy={"use_vae": False, "dropout": 0.0},
        dataset=make_dataset(4),
        max_steps=60,
        learning_rate=3e-3,
    )
    trainer.train()
    entries = logged(trainer)
    assert entries[-1]["loss"] < 0.6 * entries[0]["loss"]


def test_trains_from_a_camera(make_trainer):
    trainer = make_trainer(camera=True, learning_rate=1e-2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.image_encoder.") for name in moved)
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))


def test_eval_dataset_gives_eval_loss(make_trainer, make_dataset):
    trainer = make_trainer(policy={"dropout": 0.0}, eval_dataset=make_dataset(8, seed=2), max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    batch = trainer.data_collator(make_dataset(8, seed=2).samples)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


# --- divergence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(make_trainer, value):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_parameter(BIAS).fill_(value)
    with pytest.raises(DivergedTrainingError, match=r"at step 1 \(l1=(nan|inf), kl=\S+\)\. Lower the learning rate"):
        trainer.train()


def test_divergence_between_two_logs_is_seen_at_the_next(make_trainer):
    trainer = make_trainer(max_steps=9, logging_steps=3)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    trainer.model.get_parameter(BIAS).fill_(math.nan)

    trainer.add_callback(Poison())
    with pytest.raises(DivergedTrainingError, match="at step 6 "):
        trainer.train()


def test_divergence_after_the_last_log_ends_the_run_too(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=50)
    with torch.no_grad():
        trainer.model.get_parameter(BIAS).fill_(math.nan)
    with pytest.raises(DivergedTrainingError):
        trainer.train()


def test_a_diverged_policy_is_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=2, logging_steps=2)
    with torch.no_grad():
        trainer.model.get_parameter(BIAS).fill_(math.nan)
    with pytest.raises(DivergedTrainingError):
        trainer.train()
    assert not (tmp_path / "run" / "checkpoint-2").exists()


@pytest.fixture
def poison():
    """Return a callback that makes one of a trainer's tensors NaN after a step: a weight, averaged or of Adam."""

    class Poison(TrainerCallback):
        def __init__(self, step, what="weight"):
            self.step, self.what = step, what

        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == self.step:
                weight = model.get_parameter(BIAS)
                spoiled = {"weight": weight, "average": self.average and self.average()[BIAS]}.get(self.what)
                spoiled = optimizer.state[weight]["exp_avg_sq"] if spoiled is None else spoiled
                with torch.no_grad():
                    spoiled.fill_(math.nan)

        average = None

    return Poison


@pytest.mark.parametrize(
    ("what", "named"), [("weight", BIAS), ("average", f"{BIAS} (averaged)"), ("adam", f"{BIAS} (exp_avg_sq of the")]
)
def test_the_last_good_checkpoint_outlives_a_divergence(make_trainer, poison, tmp_path, what, named):
    callback = poison(4, what)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 50}
    trainer = make_trainer(max_steps=6, callbacks=[callback], ema_decay=0.9, **saving)
    callback.average = lambda: trainer._average.tensors
    with pytest.raises(DivergedWeightsError, match=r"checkpoint-4' is not written") as error:
        trainer.train()
    assert named in str(error.value)
    assert f"`base: {tmp_path / 'run' / 'checkpoint-2'}` in a recipe" in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert AutoPolicy.from_pretrained(tmp_path / "run" / "checkpoint-2").get_parameter(BIAS).isfinite().all()


def test_divergence_in_the_last_step_is_neither_a_result_nor_saved(make_trainer, poison, tmp_path):
    trainer = make_trainer(max_steps=2, logging_steps=50, callbacks=[poison(2)])
    with pytest.raises(DivergedWeightsError, match=BIAS):
        trainer.train()
    for save in (trainer.save_model, trainer.model.save_pretrained):
        with pytest.raises(DivergedWeightsError, match=rf"1 with NaN or infinity:\n    {BIAS}"):
            save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()


# --- learning rates ---------------------------------------------------------------------------------------


def test_vision_backbone_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(camera=True, learning_rate=1e-3, learning_rate_visual=1e-5, weight_decay=0.25)
    frozen = trainer.model.get_parameter(BIAS)
    frozen.requires_grad_(False)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    places = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            places.setdefault(names[id(parameter)], []).append((group["lr"], group["weight_decay"]))
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert places.keys() == trainable
    assert BIAS not in places
    assert all(len(found) == 1 for found in places.values())
    for name, [(rate, decay)] in places.items():
        assert rate == (1e-5 if name.startswith("backbone.image_encoder.") else 1e-3), name
        assert decay in (0.0, 0.25), name
    assert places[WEIGHT] == [(1e-3, 0.25)]
    assert places["backbone.image_encoder.embedder.embedder.convolution.weight"] == [(1e-5, 0.25)]
    assert places["backbone.encoder.layers.0.norm1.bias"] == [(1e-3, 0.0)]
    assert sum(rate == 1e-5 for [(rate, _)] in places.values()) >= 8


def test_without_learning_rate_visual_all_parts_have_one(make_trainer):
    trainer = make_trainer(camera=True, learning_rate=1e-3)
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    count = sum(parameter.numel() for group in trainer.optimizer.param_groups for parameter in group["params"])
    assert count == sum(parameter.numel() for parameter in trainer.model.parameters())


def test_learning_rate_visual_of_zero_stops_the_vision_backbone(make_trainer):
    trainer = make_trainer(camera=True, learning_rate=1e-2, learning_rate_visual=0.0, max_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if name.startswith("backbone.image_encoder."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(trainer.model.get_parameter(WEIGHT), before[WEIGHT])


def test_the_log_shows_the_policys_learning_rate(make_trainer):
    trainer = make_trainer(camera=True, learning_rate=1e-3, learning_rate_visual=1e-5, max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["learning_rate"] == 1e-3


def test_learning_rate_visual_needs_a_camera(make_trainer):
    with pytest.raises(InvalidConfigError, match=r"learning_rate_visual=1e-05, but the policy has no vision backbone"):
        make_trainer(learning_rate_visual=1e-5).train()


# --- one update -------------------------------------------------------------------------------------------


def test_accumulation_gives_the_update_of_one_big_batch(make_trainer, make_dataset):
    def train(**arguments):
        trainer = make_trainer(
            policy={"use_vae": False, "dropout": 0.0},
            dataset=make_dataset(8),
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,
            **arguments,
        )
        trainer.train()
        return trainer.model.state_dict(), [entry["loss"] for entry in logged(trainer)]

    whole, whole_losses = train(per_device_train_batch_size=8)
    parts, part_losses = train(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole_losses == pytest.approx(part_losses, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_refuses_a_processor_of_another_policy(make_policy, make_processor, make_dataset, make_arguments):
    processor = make_processor(make_policy(camera=True))
    with pytest.raises(CheckpointError, match="input_features differ"):
        PolicyTrainer(make_policy(), make_arguments(), processor, train_dataset=make_dataset())


# --- checkpoints ------------------------------------------------------------------------------------------

STATE = torch.tensor([0.5, -1.0, 2.0])


def test_checkpoints_hold_policy_and_processor(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-4"
    assert {"config.json", "model.safetensors", "processor_config.json"} <= {path.name for path in folder.iterdir()}
    trained = PolicyPipeline(model=trainer.model, processor=trainer.processor, device="cpu")
    expected = trained.predict_chunk({"observation.state": STATE})
    assert expected.shape == (4, 2)

    pipeline = PolicyPipeline.from_pretrained(folder, device="cpu")
    torch.testing.assert_close(pipeline.predict_chunk({"observation.state": STATE}), expected)
    policy = AutoPolicy.from_pretrained(folder)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value.cpu()), name
    # The checkpoint of step 2 is another policy.
    earlier = PolicyPipeline.from_pretrained(tmp_path / "run" / "checkpoint-2", device="cpu")
    assert not torch.allclose(earlier.predict_chunk({"observation.state": STATE}), expected)


def test_save_model_saves_the_processor_too(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "saved"))
    assert PolicyPipeline.from_pretrained(tmp_path / "saved", device="cpu").processor.statistics["action"]["mean"] == [
        1.0,
        -1.0,
    ]


@pytest.mark.parametrize("camera", [False, True])
def test_resuming_equals_an_uninterrupted_run(make_trainer, tmp_path, camera):
    # 12 samples in batches of 4: three steps an epoch, interrupted within the second. Dropout and latent are drawn.
    options = {"camera": camera, "lr_scheduler_type": "linear", "max_steps": 10, "save_steps": 5}
    whole = make_trainer(output="whole", save_strategy="steps", **options)
    whole.train()

    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "half" / "checkpoint-5")
    resumed = make_trainer(output="half", policy={"seed": 5}, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
    first = {entry["step"]: entry["loss"] for entry in logged(whole)}
    second = {entry["step"]: entry["loss"] for entry in logged(resumed)}
    assert second == pytest.approx(first, rel=1e-4)


def tampered(folder, change):
    """Rewrite a checkpoint's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def dropped(tensors):
    del tensors[BIAS]


def reshaped(tensors):
    tensors[WEIGHT] = torch.zeros(2, 17)


def added(tensors):
    tensors["action_head.extra.weight"] = torch.zeros(1)


TAMPERINGS = [
    (dropped, rf"1 missing:\n    {BIAS}"),
    (reshaped, rf"1 of another shape:\n    {WEIGHT}: found \(2, 17\), expected \(2, 16\)"),
    (added, r"1 unexpected:\n    action_head\.extra\.weight"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERINGS)
def test_resume_refuses_weights_that_do_not_fit(make_trainer, tmp_path, change, message):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    tampered(tmp_path / "run" / "checkpoint-1", change)
    with pytest.raises(WeightsMismatchError, match=message):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_resume_refuses_weights_that_are_no_numbers(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "run" / "checkpoint-1"
    tampered(folder, lambda tensors: tensors[BIAS.replace("\\", "")].fill_(float("nan")))
    with pytest.raises(WeightsValueError, match=rf"NaN or infinity:\n    {BIAS}"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(("change", "message"), TAMPERINGS)
def test_the_best_model_is_loaded_strictly(make_trainer, make_dataset, change, message):
    class Tamper(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            tampered(Path(args.output_dir) / f"checkpoint-{state.global_step}", change)

    trainer = make_trainer(
        max_steps=1,
        eval_dataset=make_dataset(4, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        callbacks=[Tamper()],
    )
    with pytest.raises(WeightsMismatchError, match=message):
        trainer.train()


def test_the_best_model_is_loaded(make_trainer, make_dataset, tmp_path):
    # With such a learning rate the first evaluation is the best one.
    trainer = make_trainer(
        max_steps=3,
        learning_rate=5.0,
        policy={"use_vae": False, "dropout": 0.0},
        eval_dataset=make_dataset(8, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    weights = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_resume_refuses_a_truncated_file(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is not a readable safetensors file"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(path.parent))


def sharded(folder):
    """Split a checkpoint's weights into several files, as transformers writes large ones."""
    policy = AutoPolicy.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    policy.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards


def test_resumes_from_a_sharded_checkpoint(make_trainer, tmp_path):
    whole = make_trainer(output="whole", max_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-1"
    sharded(folder)
    resumed = make_trainer(output="resumed", max_steps=2, policy={"seed": 5})
    resumed.train(resume_from_checkpoint=str(folder))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


def test_resume_refuses_a_sharded_checkpoint_that_lacks_a_tensor(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "run" / "checkpoint-1"
    for shard in sharded(folder):
        tensors = load_file(shard)
        if tensors.pop(BIAS, None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][BIAS]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsMismatchError, match=rf"1 missing:\n    {BIAS}"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))


def test_resume_reads_no_pickled_weights(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "run" / "checkpoint-1"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))


def test_resume_passes_over_a_checkpoint_that_was_being_written(make_trainer):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2)
    save = trainer.processor.save_pretrained

    def interrupted(folder, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return save(folder, *args, **kwargs)

    trainer.processor.save_pretrained = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make_trainer(max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    # It went on from step 2: that is the last whole checkpoint.
    assert [entry["step"] for entry in logged(again)] == [1, 2, 3, 4, 5, 6]


# --- plain transformers.Trainer ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_processing_class", [False, True])
@pytest.mark.parametrize("camera", [False, True])
def test_plain_trainer_trains_a_policy(
    make_policy, make_processor, make_dataset, tmp_path, with_processing_class, camera
):
    policy = make_policy(camera=camera)
    processor = make_processor(policy)
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        policy,
        arguments,
        train_dataset=make_dataset(camera=camera),
        eval_dataset=make_dataset(4, camera=camera, seed=2),
        data_collator=PolicyCollator(processor),
        **{"processing_class": processor} if with_processing_class else {},
    )
    before = policy.get_parameter(WEIGHT).detach().clone()
    trainer.train()
    assert not torch.equal(policy.get_parameter(WEIGHT), before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    batch = PolicyCollator(processor)(make_dataset(4, camera=camera, seed=2).samples)
    with torch.no_grad():
        expected = policy.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)

    folder = tmp_path / "plain" / "checkpoint-2"
    assert (folder / "processor_config.json").is_file() == with_processing_class
    assert torch.equal(AutoPolicy.from_pretrained(folder).get_parameter(WEIGHT), policy.get_parameter(WEIGHT))
    if with_processing_class:
        pipeline = PolicyPipeline.from_pretrained(folder, device="cpu")
        assert pipeline.processor.statistics == processor.statistics


def test_what_normalization_loses_and_a_crop_hides_is_said_before_training(make_dataset, tmp_path, caplog):
    config = DiffusionConfig(
        action_dim=2, robot_state_dim=2, image_features=(3, 240, 320), down_dims=(8, 16), n_groups=4, horizon=16,
        vision_config={"layer_type": "basic", "hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
        normalization_mapping={"ACTION": "QUANTILES"},
    )  # fmt: skip
    ramp = {"min": [0.0, 0.0], "max": [1.0, 1.0], "q01": [0.0, 0.0], "q99": [1.0, 0.0]}
    camera = {"mean": [0.5] * 3, "std": [0.5] * 3}
    statistics = {"action": ramp, "observation.state": ramp, "observation.images.camera_0": camera}
    names = {"action": ["arm", "gripper"]}
    processor = PolicyProcessor.from_config(config, statistics, dimension_names=names)
    arguments = PolicyTrainingArguments(str(tmp_path), use_cpu=True)
    with caplog.at_level("WARNING"):
        PolicyTrainer(DiffusionPolicy(config), arguments, processor, train_dataset=make_dataset())
    crop = (
        "Of the pictures of observation.images.camera_0, 240 × 320 pixels (height × width), the network sees a crop "
        "of 84 × 84: 9 % of the picture (`crop_shape`, `resize_shape`)."
    )
    assert crop in caplog.text
    assert "gripper of action moves from 0 to 1 in under 1 % of the frames" in caplog.text
    assert describe_policy(config.to_dict(), processor.to_dict(), 1).limits == [crop]
    assert small_crops(config.to_dict() | {"resize_shape": [96, 96]}) == []
    composed = {"input_features": config.to_dict()["input_features"], "backbone": {"type": "diffusion"}}
    assert small_crops(composed) == [crop]


HOLD = """
import sys
from manipulators._lock import locked
with locked(sys.argv[1], "a training"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_trainings_do_not_write_into_one_folder(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"a training.*{other.pid}"):
            trainer.train()
        other.stdin.close()
    trainer.train()
    assert trainer.state.global_step == 1 and not (tmp_path / ".run.lock").exists()
