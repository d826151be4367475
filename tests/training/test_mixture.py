"""A mixture in a training: from the recipe to the card, its losses, and its order after a resume."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from manipulators import (
    ACTConfig,
    ACTPolicy,
    AutoPolicy,
    LeRobotDataset,
    MixtureDataset,
    PolicyCollator,
    PolicyPipeline,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
)
from manipulators.cli import main
from manipulators.data.recording.writer import LeRobotWriter
from manipulators.errors import (
    InvalidConfigError,
    InvalidRecipeError,
    MixtureError,
    ResumeMismatchError,
    UnknownDatasetFeatureError,
)
from manipulators.hub_cards.lint import lint_card
from manipulators.training.collator import DATASET_INDEX
from manipulators.training.runs.build import build_policy
from manipulators.training.runs.opening import open_dataset
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.runs.recipe_help import recipe_help
from manipulators.training.runs.run import run_recipe

STATE, ACTION = "observation.state", "action"
SCRIPT = Path(__file__).parent / "mixture_in_processes.py"


def record(root, width=2, episodes=2, length=6, fps=10, cameras=("top",), task="push it", **options):
    """Write a dataset of states and actions of one width, and cameras."""
    vector = {"dtype": "float32", "shape": [width], "names": [f"j{i}" for i in range(width)], "units": ["m"] * width}
    pictures = {f"observation.images.{name}": {"dtype": "video", "shape": [32, 32, 3]} for name in cameras}
    random = np.random.default_rng(width)
    with LeRobotWriter(root, fps, {STATE: vector, ACTION: vector} | pictures, **options) as writer:
        for _ in range(episodes):
            for _ in range(length):
                frame = {name: random.integers(256, size=(32, 32, 3), dtype=np.uint8) for name in pictures}
                state = random.standard_normal(width).astype(np.float32)
                writer.add_frame(frame | {STATE: state, ACTION: 2 * state}, task=task)
            writer.end_episode()
    return root


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets of two robots: 12 samples of width 2 with two cameras, 6 of width 3 with one."""
    folder = tmp_path_factory.mktemp("mixture")
    record(folder / "wide", cameras=("top", "wrist"))
    record(folder / "narrow", width=3, episodes=1, task="pull it")
    return folder


RECIPE = """
policy: gr00t_n1_5
tokenizer: words
data:
  weights_by: dataset
  mixture:
    - {{dataset: {folder}/wide, embodiment: two_joints}}
    - {{dataset: {folder}/narrow, weight: 3, embodiment: three_joints, name: few}}
config:
  n_action_steps: 2
  embodiment_ids: {{two_joints: 0, three_joints: 1}}
  embodiment_tag: two_joints
  backbone_cfg: {{select_layer: 1, tune_llm: true}}
  eagle_config:
    image_token_index: 4
    vision_config: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
      image_size: 32, patch_size: 16}}
    text_config: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
      num_key_value_heads: 2, head_dim: 8, vocab_size: 64}}
  action_head_cfg:
    action_horizon: 4
    max_state_dim: 4
    action_dim: 4
    max_action_dim: 4
    max_num_embodiments: 2
    backbone_embedding_dim: 16
    input_embedding_dim: 16
    hidden_size: 16
    num_target_vision_tokens: 2
    diffusion_model_cfg: {{num_attention_heads: 2, attention_head_dim: 8, num_layers: 1, output_dim: 16,
      interleave_self_attention: true, cross_attention_dim: 16, dropout: 0.0}}
    vl_self_attention_cfg: {{num_attention_heads: 2, attention_head_dim: 8, num_layers: 1, dropout: 0.0}}
training: {{max_steps: 8, per_device_train_batch_size: 4, learning_rate: 1e-3, logging_steps: 2, use_cpu: true,
  disable_tqdm: true, lr_scheduler_type: constant, save_steps: 4, save_total_limit: 3}}
output: {folder}/trained
"""


@pytest.fixture(scope="module")
def recipe(folder):
    """Build the recipe with overrides."""
    path = folder / "two.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture(scope="module")
def trained(recipe):
    return run_recipe(recipe(), command="manipulators train two")


# --- the run ---------------------------------------------------------------------------------------------------------


def test_two_robots_train_one_policy(trained):
    record = json.loads((trained / "training.json").read_text())
    rows = {row["name"].rpartition("/")[2]: row for row in record["dataset"]["mixture"]}
    assert (record["dataset"]["episodes"], record["dataset"]["frames"], record["dataset"]["tasks"]) == (3, 18, 2)
    assert (rows["wide"]["share"], rows["narrow"]["share"]) == (0.25, 0.75)
    assert (rows["narrow"]["weight"], rows["narrow"]["embodiment"], rows["narrow"]["frames"]) == (3, "three_joints", 6)
    processor = json.loads((trained / "processor_config.json").read_text())
    assert {name: len(own["action"]["mean"]) for name, own in processor["embodiments"].items()} == {
        "two_joints": 2,
        "three_joints": 3,
    }
    assert processor["embodiment"] is None
    assert processor["optional_cameras"] == ["observation.images.wrist"]


def test_the_log_has_the_loss_of_every_dataset(trained):
    logged = [entry for entry in json.loads((trained / "training.json").read_text())["log_history"] if "flow" in entry]
    assert len(logged) == 4
    for entry in logged:
        # The loss is over the action values of both: 4 samples of a step have 4 steps of 2 or 3 dimensions each.
        own = [entry[f"loss/{name}"] for name in ("wide", "few") if f"loss/{name}" in entry]
        assert min(own) - 1e-4 <= entry["flow"] <= max(own) + 1e-4


def test_one_of_the_robots_is_loaded(trained):
    three = PolicyPipeline.from_pretrained(trained, embodiment="three_joints")
    picture = np.zeros((32, 32, 3), np.uint8)
    observation = {STATE: np.zeros(3, np.float32), "observation.images.top": picture}
    assert three(observation, task="pull it").shape == (3,)
    assert three.policy.config.embodiment_ids["three_joints"] == 1
    assert three.processor(observation, task="pull it")["embodiment_id"].tolist() == [1]
    assert [d.name for d in three.processor.contract().outputs[0].dimensions] == ["j0", "j1", "j2"]
    other = PolicyPipeline.from_pretrained(trained, embodiment="two_joints")
    observation = {STATE: np.zeros(2, np.float32), "observation.images.top": picture}
    assert other(observation | {"observation.images.wrist": picture}, task="push it").shape == (2,)
    for given, message in ((None, "No embodiment is chosen"), ("arm", "no embodiment 'arm'")):
        with pytest.raises(Exception, match=rf"{message}.*three_joints, two_joints"):
            PolicyPipeline.from_pretrained(trained, embodiment=given)
        with pytest.raises(Exception, match=rf"{message}.*three_joints, two_joints"):
            pipeline("robotics", model=str(trained), embodiment=given)


def test_a_robot_that_is_new_to_a_base_gets_a_slot_of_its_own(recipe, trained, folder):
    changes = [("base", str(trained)), ("data.mixture.0.embodiment", "new_arm"), ("config", "{}")]
    given = recipe(*changes)
    dataset = open_dataset(given)
    with pytest.raises(InvalidConfigError, match=r"'new_arm' in slot 2, but there are max_num_embodiments=2"):
        build_policy(given, dataset)
    known = recipe(("base", str(trained)), ("config", "{}"))
    policy, processor = build_policy(known, open_dataset(known))
    assert policy.config.embodiment_ids == {"two_joints": 0, "three_joints": 1}
    assert set(processor.embodiments) == {"two_joints", "three_joints"}


def test_saved_again_it_still_knows_all_robots(trained, tmp_path):
    PolicyPipeline.from_pretrained(trained, embodiment="three_joints").save_pretrained(tmp_path)
    first, again = (json.loads((f / "processor_config.json").read_text()) for f in (trained, tmp_path))
    assert again == first | {"embodiment": "three_joints"}
    assert PolicyPipeline.from_pretrained(tmp_path, embodiment="two_joints").processor.input_features[STATE].shape == (
        2,
    )
    assert AutoPolicy.from_pretrained(tmp_path).config.state_dim == 3


def test_the_card_lists_datasets_and_robots(trained):
    text = (trained / "README.md").read_text(encoding="utf-8")
    assert "| narrow | `three_joints` | 3 | 75 % | 1 | 6 |" in text
    assert "| wide | `two_joints` | 1 | 25 % | 2 | 12 |" in text
    assert text.count("### Robot `") == 2
    assert 'PolicyPipeline.from_pretrained("path/to/this/folder", embodiment="two_joints")' in text
    assert lint_card(text) == []


# --- resume ----------------------------------------------------------------------------------------------------------


def read_samples(monkeypatch):
    """Return a list to which every read sample of a mixture is added, as (dataset, position)."""
    seen = []
    plain = MixtureDataset.__getitems__

    def listening(mixture, indices):
        owners, positions = mixture.locate(indices)
        seen.extend(zip(owners.tolist(), positions.tolist(), strict=True))
        return plain(mixture, indices)

    monkeypatch.setattr(MixtureDataset, "__getitems__", listening)
    return seen


def test_a_resumed_run_reads_the_same_samples_and_ends_with_the_same_weights(trained, recipe, tmp_path, monkeypatch):
    seen = read_samples(monkeypatch)
    whole = run_recipe(recipe(("output", str(tmp_path / "whole"))))
    all_samples, seen[:] = list(seen), []
    run_recipe(recipe(("output", str(tmp_path / "cut")), ("training.max_steps", "4"), ("training.save_steps", "4")))
    first, seen[:] = list(seen), []
    resumed = recipe(("output", str(tmp_path / "cut")))
    (tmp_path / "cut" / "model.safetensors").unlink()
    run_recipe(resumed, resume=True)
    assert len(all_samples) >= 32
    assert first[:16] == all_samples[:16]
    assert seen[-16:] == all_samples[-16:]  # those that were read before are skipped by the sampler
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "cut")]
    assert files[0] == files[1]


def test_another_weight_is_another_run(recipe, trained):
    with pytest.raises(ResumeMismatchError, match=r"dataset\.mixture\.few\.samples_of_epoch"):
        run_recipe(recipe(("data.mixture.1.weight", "2"), ("training.max_steps", "10")), resume=True)


def test_two_processes_with_workers_go_on_in_the_same_order(folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SCRIPT), str(folder), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen_{rank}.json").read_text()) for rank in (0, 1)]
    for runs in ranks:
        assert len(runs["whole"]["seen"]) == 8
        assert runs["cut"]["seen"] + runs["resumed"]["seen"] == runs["whole"]["seen"]
        for after, before in zip(runs["resumed"]["log"][1:], runs["whole"]["log"][1:], strict=True):
            assert after == pytest.approx(before, rel=1e-6)
    assert ranks[0]["whole"]["seen"] != ranks[1]["whole"]["seen"]
    of_an_epoch = [owner for runs in ranks for batch in runs["whole"]["seen"][:3] for owner, _ in batch]
    assert np.bincount(of_an_epoch).tolist() == [6, 6]  # the 12 samples of the epoch, each dataset half of them


# --- other doors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_robot(tmp_path_factory):
    """Two datasets of one robot, 12 and 6 samples."""
    folder = tmp_path_factory.mktemp("one_robot")
    roots = record(folder / "long"), record(folder / "short", episodes=1, task="pull it")
    return [LeRobotDataset(root, action_horizon=4) for root in roots]


def act(mixture):
    backbone = {"layer_type": "basic", "hidden_sizes": [8] * 4, "depths": [1] * 4, "embedding_size": 8}
    config = ACTConfig.for_dataset(
        mixture,
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_vae=False,
        dropout=0.0,
        pretrained_backbone_weights=None,
        vision_config=backbone,
    )
    return ACTPolicy(config), PolicyProcessor.from_config(config, **mixture.processor_fields(config))


def test_transformers_trainer_trains_on_a_mixture(one_robot, tmp_path):
    mixture = MixtureDataset(one_robot, weights_by="dataset")
    policy, processor = act(mixture)
    assert torch.tensor(processor.statistics[STATE]["count"]).item() == 18
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(policy, arguments, train_dataset=mixture, data_collator=PolicyCollator(processor))
    assert trainer.train().global_step == 2


def test_losses_of_datasets_over_accumulated_batches(one_robot, tmp_path):
    mixture = MixtureDataset(one_robot, names=["long", "short"])
    policy, processor = act(mixture)
    arguments = PolicyTrainingArguments(
        str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=3,  # one epoch
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-9,
    )
    trainer = PolicyTrainer(policy, arguments, processor, train_dataset=mixture)
    trainer.train()
    entry = trainer.state.log_history[0]
    collator = PolicyCollator(processor, with_datasets=True)
    batch = collator(mixture.__getitems__(range(18)))
    index = batch.pop(DATASET_INDEX)
    with torch.no_grad():
        sums = policy.train()(**batch).sample_errors
    for i, name in enumerate(mixture.names):
        total, count = sums[index == i].sum(0).tolist()
        assert entry[f"loss/{name}"] == pytest.approx(total / count, rel=1e-4)
    assert entry["l1"] == pytest.approx((sums[:, 0].sum() / sums[:, 1].sum()).item(), rel=1e-4)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_says_and_takes_all_of_a_mixture(recipe, folder, tmp_path):
    changed = recipe(("data.mixture.1.weight", "0.5"), ("data.mixture.0.episodes", "[1]"), ("data.fps", "10"))
    assert (changed.data.mixture[1].weight, changed.data.mixture[0].episodes, changed.data.fps) == (0.5, [1], 10.0)
    (tmp_path / "again.yaml").write_text(str(changed))
    assert load_recipe(tmp_path / "again.yaml", [("name", "two")]) == changed
    assert recipe(("data.dataset", "other/one")).data.mixture is None
    given = recipe(("data.mixture", "[{dataset: a/b, weight: 2}, {dataset: c/d}]")).data.mixture
    assert [(entry.dataset, entry.weight) for entry in given] == [("a/b", 2.0), ("c/d", 1.0)]
    text = recipe_help(changed)
    for line in (
        "data.mixture: several datasets",
        "--data.mixture.0.weight  float = 1.0",
        "--data.mixture.0.embodiment",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("data.dataset", "x/y"), ("data.mixture.0.weight", "2")], r"dataset and mixture exclude each other"),
        ([("data.mixture.2.weight", "2")], r"'2' is none of the list's entries, 0 … 1\."),
        ([("data.mixture.0.wait", "2")], r"data: mixture has no field 'wait'\. Did you mean 'weight'"),
        ([("data.mixture", "[]")], r"it lacks dataset, or several datasets as mixture"),
        ([("data.fps", "0")], r"fps=0\.0 must be above 0"),
    ],
)
def test_what_is_no_recipe_of_a_mixture(recipe, overrides, message):
    with pytest.raises(InvalidRecipeError, match=message):
        recipe(*overrides)


def test_what_a_mixture_cannot_train(recipe, folder, tmp_path):
    fast = record(tmp_path / "fast", fps=25, width=3)
    output = ("output", str(tmp_path / "out"))
    with pytest.raises(MixtureError, match=r"control rates: wide 10 Hz, few 25 Hz\. .*such as 5: fps in a recipe"):
        run_recipe(recipe(output, ("data.mixture.1.dataset", str(fast))))
    with pytest.raises(InvalidRecipeError, match=r"fast has 25 frames per second, .*fps: 10\. .*read 25, 5, 1;"):
        run_recipe(recipe(output, ("data.mixture.1.dataset", str(fast)), ("data.fps", "10")))
    with pytest.raises(MixtureError, match=r"has 2 dimensions in wide, 3 in few.*Say which robot"):
        run_recipe(recipe(output, ("data.mixture.1.embodiment", "two_joints")))
    with pytest.raises(
        UnknownDatasetFeatureError, match=r"No dataset of the mixture has a feature 'observation\.images\.tip'"
    ):
        run_recipe(recipe(output, ("inputs", "[observation.state, observation.images.tip]")))
    with pytest.raises(InvalidRecipeError, match=r"relative_actions: the datasets' dimensions match differently"):
        run_recipe(recipe(output, ("relative_actions", "true")))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_other_rates_are_read_at_one(recipe, folder, tmp_path):
    fast = record(tmp_path / "fast", fps=30, width=3, length=13)
    given = recipe(("data.mixture.1.dataset", str(fast)), ("data.fps", "10"))
    config = type("Config", (), {"action_horizon": 4, "n_obs_steps": 1, "frames_without_start": 1})
    mixture = open_dataset(given, config)
    assert mixture.fps == 10
    assert mixture.datasets[1].time_windows[ACTION] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [len(dataset) for dataset in mixture.datasets] == [10, 20]  # of an end, 1 and 3 frames start no sample


def test_the_command_line_trains_and_says_what_is_wrong(folder, recipe, tmp_path, capsys):
    arguments = ["train", str(folder / "two.yaml"), "--output", str(tmp_path / "out"), "--training.max_steps", "1"]
    assert main([*arguments, "--data.mixture.1.weight", "-1"]) == 1
    assert "The weight of few is -1.0; a weight is a number above 0." in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["card", str(tmp_path / "out"), "--check"]) == 0
