"""What a recipe builds for a dataset whose cameras are declared as (c, h, w), as openpi's converter writes them."""

import json

import datasets
import numpy as np
import pytest
from transformers import ResNetConfig, ResNetModel

from manipulators import AutoPolicy, LeRobotWriter, PolicyFeature, PolicyPipeline
from manipulators.errors import InvalidRecipeError
from manipulators.modeling import registry
from manipulators.training.build import build_policy, open_dataset
from manipulators.training.recipe import load_recipe
from manipulators.training.run import run_recipe

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
