"""What a recipe builds for datasets as other projects write them."""

import json
import shlex

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PI0Config, PI0ForConditionalGeneration, ResNetConfig, ResNetModel

from manipulators import (
    AutoPolicy,
    LeRobotDataset,
    LeRobotWriter,
    PolicyFeature,
    PolicyPipeline,
    convert_dataset,
    merge_and_save,
)
from manipulators.cli import main
from manipulators.errors import DatasetFormatError, FrameNotFoundError, InvalidRecipeError, MissingStatisticsError
from manipulators.modeling import registry
from manipulators.training.runs import run
from manipulators.training.runs.build import build_policy, open_dataset
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.runs.run import run_recipe

CAMERA = "observation.images.top"
RECIPE = """
policy: act_policy
data: {{dataset: {folder}/chw}}
output: {folder}/trained
config: {{chunk_size: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1, use_vae: false,
  vision_backbone: small, vision_norm: group, pretrained_backbone_weights: null,
  vision_config: {{layer_type: basic, embedding_size: 8, hidden_sizes: [8, 8], depths: [1, 1]}}}}
training: {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe on two episodes of a 32 × 48 camera, declared as [3, 32, 48]."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = {
        CAMERA: {"dtype": "video", "shape": [3, 32, 48], "names": ["channels", "height", "width"]},
        "observation.state": {"dtype": "float32", "shape": [2]},
        "action": {"dtype": "float32", "shape": [2]},
    }
    with LeRobotWriter(tmp_path / "chw", 10, features) as writer:
        for episode in range(2):
            for number in range(5):
                vector = np.array([number, episode], dtype=np.float32)
                picture = np.full((3, 32, 48), 40 * number, dtype=np.uint8)
                writer.add_frame({CAMERA: picture, "observation.state": vector, "action": vector}, task="push")
            writer.end_episode()
    path = tmp_path / "chw/meta/info.json"
    info = json.loads(path.read_text())
    assert info["features"][CAMERA]["shape"] == [32, 48, 3]  # what the writer makes of it
    info["features"][CAMERA] |= {"shape": [3, 32, 48], "names": ["channels", "height", "width"]}
    path.write_text(json.dumps(info))
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(folder=tmp_path))
    return load_recipe(tmp_path / "tiny.yaml")


PI0 = """
policy: pi0_policy
base: {folder}/base
tokenizer: words
data: {{dataset: {folder}/chw}}
output: {folder}/tuned
training: {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}}
"""


def test_a_base_keeps_its_horizon_and_its_empty_cameras(recipe, tiny_pi0, statistics_of, tmp_path):
    """The recipe names neither; another robot's cameras take the place of the base's."""
    config = tiny_pi0({"wrist": (3, 32, 32)}, state=2, empty_cameras=1, chunk_size=7)
    AutoPolicy.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "tune.yaml").write_text(PI0.format(folder=tmp_path))
    pipeline = PolicyPipeline.from_pretrained(run_recipe(load_recipe(tmp_path / "tune.yaml")), device="cpu")
    assert list(pipeline.policy.config.image_features) == [CAMERA, "observation.images.empty_camera_0"]
    assert pipeline.policy.config.optional_cameras == ("observation.images.empty_camera_0",)
    observation = {CAMERA: np.zeros((32, 48, 3), dtype=np.uint8), "observation.state": np.zeros(2)}
    assert pipeline.predict_chunk(observation, task="push").shape == (7, 2)


def test_a_tokenizer_of_words_knows_those_that_a_prompt_adds(recipe, tiny_pi05, tmp_path):
    """π0.5 writes the state's numbers; a tokenizer without them would lose the state."""
    config = tiny_pi05({"wrist": (3, 32, 32)}, state=2)
    config.set_vocabulary_size(300)
    AutoPolicy.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "tune.yaml").write_text(PI0.format(folder=tmp_path).replace("pi0_policy", "pi05_policy"))
    pipeline = PolicyPipeline.from_pretrained(run_recipe(load_recipe(tmp_path / "tune.yaml")), device="cpu")
    observation = {CAMERA: np.zeros((32, 48, 3), dtype=np.uint8), "observation.state": np.array([4.0, -9.0])}
    tokens = pipeline.processor(observation, task="push")["input_ids"][0]
    assert pipeline.processor.tokenizer.decode(tokens, skip_special_tokens=True) == (
        "task : push , state : 255 - 1 ; action :"
    )
    assert pipeline.processor.tokenizer.unk_token_id not in tokens


def test_a_base_of_another_project_is_tuned_and_saved_as_what_loads(recipe, tiny_pi0, tmp_path, monkeypatch):
    """transformers' π0, with an empty camera; the recipe's part of a field only fits the base, not the class."""
    sizes = tiny_pi0().backbone_config()
    kinds = {"text_config": sizes.paligemma_config.text_config, "vision_config": sizes.paligemma_config.vision_config}
    parts = {name: part.to_dict() for name, part in kinds.items()} | {"projection_dim": 32, "image_token_id": 31}
    expert = sizes.gemma_expert_config.to_dict()
    widths = {"chunk_size": 7, "max_state_dim": 4, "max_action_dim": 3}
    native = PI0Config(vlm_config=parts | {"model_type": "paligemma"}, dit_config=expert, **widths)
    PI0ForConditionalGeneration(native).save_pretrained(tmp_path / "base")
    changed = {"empty_cameras": 1, "paligemma_config": {"vision_config": {"image_size": 28}}}
    saved_at = "save_strategy: steps, save_steps: 1"
    values = PI0.format(folder=tmp_path).replace("max_steps: 1", f"max_steps: 1, {saved_at}, learning_rate: 0.01")
    (tmp_path / "tune.yaml").write_text(f"{values}config: {json.dumps(changed)}\n")
    trained = []
    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: (trained.append(given[1:3]), save(*given)))
    folder = run_recipe(load_recipe(tmp_path / "tune.yaml"))
    expected = PolicyPipeline(*trained[0], device="cpu")
    observation = {CAMERA: np.full((32, 48, 3), 99, dtype=np.uint8), "observation.state": np.ones(2)}
    noise = torch.ones(1, 7, 3)
    for source in (folder, folder / "checkpoint-1"):
        pipeline = PolicyPipeline.from_pretrained(source, device="cpu")
        assert list(pipeline.policy.config.image_features) == [CAMERA, "observation.images.empty_camera_0"]
        chunk = pipeline.predict_chunk(observation, task="push", noise=noise)
        assert torch.equal(chunk, expected.predict_chunk(observation, task="push", noise=noise))


def recipe_config(recipe):
    return registry.policy_class(recipe.policy).config_class(**recipe.config)


def test_channels_come_first_in_the_policy(recipe):
    dataset = open_dataset(recipe, recipe_config(recipe))
    policy, processor = build_policy(recipe, dataset)
    assert policy.config.input_features[CAMERA] == PolicyFeature("VISUAL", (3, 32, 48))
    assert processor.input_features == policy.config.input_features


def test_it_trains_and_acts(recipe):
    pipeline = PolicyPipeline.from_pretrained(run_recipe(recipe), device="cpu")
    observation = {CAMERA: np.zeros((32, 48, 3), np.uint8), "observation.state": np.zeros(2, np.float32)}
    assert pipeline(observation).shape == (2,)


def test_no_outputs_are_refused(recipe):
    recipe.inputs = []
    with pytest.raises(InvalidRecipeError, match=r"gives the inputs \[\] and the outputs"):
        build_policy(recipe, open_dataset(recipe, recipe_config(recipe)))


def edit_columns(folder, change):
    """Change the only data file of a dataset."""
    path = folder / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def renamed(folder, names):
    """Give features other names, in meta/ and in the data file."""
    for path in folder.glob("meta/*.json"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(text)
    edit_columns(folder, lambda table: table.replace_schema_metadata(None).rename_columns(
        [names.get(name, name) for name in table.column_names]
    ))  # fmt: skip


def test_the_names_of_openpi_are_renamed_from_the_command_line(recipe, tmp_path, capsys):
    """The message says what to add, and the recipe and the command take it as it is."""
    renamed(tmp_path / "chw", {"observation.state": "state", "action": "actions"})
    arguments = ["train", str(tmp_path / "tiny.yaml")]
    assert main(arguments) == 1
    remedy = "--data.rename_map '{actions: action, state: observation.state}'"
    assert remedy in capsys.readouterr().err
    for option in (shlex.split(remedy), ["--data.rename_map.actions", "action", "--data.rename_map.state"]):
        option = option if len(option) == 2 else [*option, "observation.state"]
        output = tmp_path / f"trained_{len(option)}"
        assert main([*arguments, *option, "--output", str(output)]) == 0
        assert list(PolicyPipeline.from_pretrained(output).policy.config.input_features) == [
            CAMERA,
            "observation.state",
        ]
    assert main([*arguments, "--data.rename_map", "{actions"]) == 1
    assert "InvalidRecipeError" in capsys.readouterr().err


def test_every_remedy_exists_in_a_recipe(recipe, tmp_path, monkeypatch):
    """Time stamps that drift, cameras and episodes to leave out, another revision: as the errors say."""

    def drifted(table):
        times = [row["frame_index"] / 10 + 0.02 * (row["frame_index"] % 2) for row in table.to_pylist()]
        position = table.column_names.index("timestamp")
        return table.set_column(position, table.schema.field("timestamp"), pa.array(times, pa.float32()))

    edit_columns(tmp_path / "chw", drifted)
    with pytest.raises(FrameNotFoundError, match=r"a larger tolerance_s= \(train: --data\.tolerance_s, "):
        run_recipe(recipe)
    overrides = {"tolerance_s": "0.05", "features": f"[{CAMERA}]", "episodes": "[1]", "decoded_cache": "null"}
    changed = load_recipe(tmp_path / "tiny.yaml", [(f"data.{name}", text) for name, text in overrides.items()])
    dataset = open_dataset(changed, recipe_config(recipe))
    assert (dataset.episodes, list(dataset.recorded_features)) == ([1], [CAMERA, "action"])
    assert len(dataset[:][CAMERA]) == 5
    seen = []
    monkeypatch.setattr("manipulators.data.dataset.fetch_metadata", lambda *given: seen.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_dataset(load_recipe(tmp_path / "tiny.yaml", [("data.revision", "v2.1")]), recipe_config(recipe))
    assert seen == [(str(tmp_path / "chw"), "v2.1")]


def test_nan_in_a_column_that_the_policy_does_not_use_is_no_reason_to_refuse(recipe, tmp_path):
    path = tmp_path / "chw/meta/info.json"
    info = json.loads(path.read_text())
    info["features"] |= {
        name: {"dtype": "float32", "shape": [1]} for name in ("next.reward", "observation.environment_state")
    }
    path.write_text(json.dumps(info))
    nan = pa.array([float("nan")] * 10, pa.float32())
    edit_columns(
        tmp_path / "chw",
        lambda t: t.append_column("next.reward", nan).append_column("observation.environment_state", nan),
    )
    recipe.inputs = ["observation.state"]
    run_recipe(recipe)
    names = {"features": ["observation.state", "action", "next.reward"]}
    assert LeRobotDataset(tmp_path / "chw", **names)[3]["next.reward"].isnan()
    with pytest.raises(DatasetFormatError, match=r"environment_state has NaN or infinity in frame 0"):
        convert_dataset(tmp_path / "chw", tmp_path / "new", progress=False)
    new = LeRobotDataset(convert_dataset(tmp_path / "chw", tmp_path / "new", progress=False, **names))
    assert new[3]["next.reward"].isnan() and "next.reward" not in new.statistics


def test_a_camera_without_statistics_is_refused(recipe, tmp_path):
    path = tmp_path / "chw/meta/stats.json"
    path.write_text(json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != CAMERA}))
    dataset = open_dataset(recipe, recipe_config(recipe))
    with pytest.raises(
        MissingStatisticsError, match=r"images\.top.*manipulators convert-dataset <dataset> <new folder>"
    ):
        build_policy(recipe, dataset)


QLORA = """
quantization: 4bit
training: {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true,
  tune_llm: lora, lora_rank: 2}}
"""


def test_an_adapter_on_a_base_in_4_bits(bitsandbytes, recipe, tiny_pi0, statistics_of, tmp_path):
    base = tiny_pi0({"top": (3, 32, 48)}, state=2)
    policy = registry.policy_class(base.model_type)(base)
    policy.save_pretrained(tmp_path / "base")
    text = PI0.partition("training:")[0] + QLORA
    (tmp_path / "qlora.yaml").write_text(text.format(folder=tmp_path))
    output = run_recipe(load_recipe(tmp_path / "qlora.yaml"))
    assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()
    trained = AutoPolicy.from_pretrained(output)
    assert trained.is_loaded_in_4bit
    merged = merge_and_save(trained, tmp_path / "merged")
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "merged", device="cpu")
    inputs, draws = base.example_inputs(1), base.example_draws(1)
    found, expected = (p.predict_action_chunk(**inputs, **draws) for p in (pipeline.policy, trained))
    assert torch.equal(found, merged.predict_action_chunk(**inputs, **draws))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_quantization_without_a_base_or_an_adapter(bitsandbytes, recipe, tmp_path):
    recipe.quantization = "8bit"
    config_class = registry.policy_class(recipe.policy).config_class
    dataset = open_dataset(recipe, config_class(**recipe.config))
    with pytest.raises(InvalidRecipeError, match="is that of a base"):
        build_policy(recipe, dataset)
    recipe.base = str(tmp_path)
    with pytest.raises(InvalidRecipeError, match=r"--training\.tune_llm lora"):
        build_policy(recipe, dataset)


def test_a_camera_without_statistics_gets_those_of_the_pretrained_backbone(recipe, tmp_path):
    path = tmp_path / "chw/meta/stats.json"
    statistics = json.loads(path.read_text())
    del statistics[CAMERA]
    path.write_text(json.dumps(statistics))
    network = ResNetConfig(**recipe.config["vision_config"])
    ResNetModel(network).save_pretrained(tmp_path / "resnet")
    recipe.config |= {"vision_norm": "frozen_batch", "pretrained_backbone_weights": str(tmp_path / "resnet")}
    _, processor = build_policy(recipe, open_dataset(recipe, recipe_config(recipe)))
    assert np.ravel(processor.statistics[CAMERA]["mean"]) == pytest.approx([0.485, 0.456, 0.406])
