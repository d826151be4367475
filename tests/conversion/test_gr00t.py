"""NVIDIA's layout of GR00T, read from a folder that is written here as NVIDIA writes it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import AutoPolicy, GR00TN1_5Policy, PolicyPipeline, load_published
from manipulators.checkpoint import find_layout
from manipulators.conversion.gr00t import rename_gr00t_weights
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    EmbodimentError,
    InvalidConfigError,
    MissingFileError,
    MissingTokenizerError,
    UnknownConfigFieldError,
    WeightsMismatchError,
)
from manipulators.processing.word_tokenizer import word_tokenizer

TOKENIZER = word_tokenizer(["press the button"])
EAGLE = "backbone.eagle_model."
MODEL = f"{EAGLE}language_model.model."


def statistics(*widths):
    """Return statistics of every kind for parts a, b, … of these widths."""
    ranges = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    return {name: {w: [x] * width for w, x in ranges.items()} for name, width in zip("abc", widths, strict=False)}


def robot(state, action, cameras=("front",)):
    """Return NVIDIA's record of a robot with parts a, b, … of these widths."""
    described = {"absolute": True, "rotation_type": None, "continuous": True}
    return {
        "statistics": {"state": statistics(*state), "action": statistics(*action)},
        "modalities": {
            "video": {name: {"resolution": [32, 24], "channels": 3, "fps": 20.0} for name in cameras},
            "state": {name: described | {"shape": [n]} for name, n in zip("abc", state, strict=False)},
            "action": {name: described | {"shape": [n]} for name, n in zip("abc", action, strict=False)},
        },
        "embodiment_tag": "",
    }


@pytest.fixture
def policy(tiny_gr00t_n1_5):
    torch.manual_seed(0)
    return GR00TN1_5Policy(tiny_gr00t_n1_5(select_layer=2)).eval()


@pytest.fixture
def published(policy):
    """The policy's weights under their published names, with what the published file holds and nobody reads."""
    weights = {}
    for name, value in policy.state_dict().items():
        name = name.replace("vision_model.", "vision_model.vision_model.")
        weights[name.replace("language_model.", "language_model.model.")] = value
    embedding = weights[f"{MODEL}embed_tokens.weight"]
    weights[f"{EAGLE}language_model.lm_head.weight"] = embedding + 1.0
    weights[f"{EAGLE}vision_model.vision_model.head.probe"] = torch.zeros(1, 1, 24)
    return weights


@pytest.fixture
def write(policy, published, tmp_path):
    """Return a function: robots, further fields of config.json → a folder as NVIDIA writes it, weights in two files.

    It comes with the keywords that say what NVIDIA's file does not: the sizes of the vision-language model.
    """

    def write_folder(robots=None, weights=None, **fields):
        config = policy.config.to_dict()
        names = ("backbone_cfg", "action_head_cfg", "action_dim", "action_horizon", "hidden_size", "compute_dtype")
        values = {name: config[name] for name in names} | {
            "architectures": ["GR00T_N1_5"],
            "attn_implementation": None,
            "model_type": "gr00t_n1_5",
            "model_dtype": "float32",
            "torch_dtype": "float32",
            "transformers_version": "4.51.3",
        }
        (tmp_path / "config.json").write_text(json.dumps(values | fields))
        weights = published if weights is None else weights
        split = {f"model-0000{i + 1}-of-00002.safetensors": sorted(weights)[i::2] for i in range(2)}
        for file, held in split.items():
            save_file({name: weights[name].clone() for name in held}, tmp_path / file, {"format": "pt"})
        index = {name: file for file, held in split.items() for name in held}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        robots = {"gr1": robot([2, 1], [2])} if robots is None else robots
        if robots:
            (tmp_path / "experiment_cfg").mkdir(exist_ok=True)
            (tmp_path / "experiment_cfg" / "metadata.json").write_text(json.dumps(robots))
        return tmp_path, {"eagle_config": config["eagle_config"], "embodiment_ids": config["embodiment_ids"]}

    return write_folder


def test_layout_is_told_from_ours(policy):
    assert find_layout({"model_type": "gr00t_n1_5"}) is not None
    assert find_layout({"model_type": "gr00t_n1"}) is not None
    assert find_layout(policy.config.to_dict()) is None


def test_policy_alone(policy, write):
    """The weights are found whole, whichever robot they are for."""
    folder, sizes = write({})
    loaded = AutoPolicy.from_pretrained(folder, **sizes)
    assert not loaded.training
    assert loaded.config.input_features == {} and loaded.config.embodiment_tag == "new_embodiment"
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = loaded.config.example_inputs(2)
    assert torch.isfinite(loaded(**inputs).loss)


def test_pipeline_for_one_robot(write):
    """States of gr1 are angles; its actions are scaled between their extremes."""
    folder, sizes = write({"gr1": robot([1, 1], [2, 1]), "new_embodiment": robot([3], [2])})
    pipeline = PolicyPipeline.from_pretrained(folder, embodiment="gr1", tokenizer=TOKENIZER, device="cpu", **sizes)
    config, processor = pipeline.policy.config, pipeline.processor
    assert (config.embodiment_tag, config.embodiment_id, config.robot_action_dim) == ("gr1", 2, 3)
    assert config.state_parts == {"a": {"width": 1, "mode": "sin_cos"}, "b": {"width": 1, "mode": "sin_cos"}}
    assert list(config.input_features) == ["observation.images.front", "observation.state"]
    angles = torch.tensor([0.5, -0.25])
    observation = {"video.front": torch.ones(24, 32, 3), "state.a": angles[:1], "state.b": angles[1:]}
    inputs = processor(observation, task="press the button")
    expected = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()  # per part
    torch.testing.assert_close(inputs["state"][0, :4], expected)
    assert inputs["embodiment_id"].tolist() == [2]
    noise = torch.randn(1, 5, 4)
    chunk = pipeline.policy.predict_action_chunk(**inputs, noise=noise)[0, :, :3]
    found = pipeline.predict_chunk(observation, task="press the button", noise=noise)
    torch.testing.assert_close(found, chunk * 2.0)
    assert pipeline(observation, task="press the button").shape == (3,)


def test_the_only_robot_needs_no_choice_and_parts_can_be_chosen(write):
    folder, sizes = write({"new_embodiment": robot([2, 1], [2, 1], cameras=("front", "wrist"))})
    pipeline = PolicyPipeline.from_pretrained(
        folder,
        device="cpu",
        tokenizer=TOKENIZER,
        modes={"state.b": "binary"},
        keys=["video.wrist", "state.b", "state.a", "action.b"],
        **sizes,
    )
    config = pipeline.policy.config
    assert config.state_parts == {"b": {"width": 1, "mode": "binary"}, "a": {"width": 2, "mode": "min_max"}}
    assert config.action_parts == {"b": {"width": 1, "mode": "min_max"}}
    assert list(config.image_features) == ["observation.images.wrist"]


def test_what_is_saved_needs_nothing_else(write, tmp_path_factory):
    folder, sizes = write()
    pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", tokenizer=TOKENIZER, **sizes)
    ours = tmp_path_factory.mktemp("ours")
    pipeline.save_pretrained(ours)
    again = PolicyPipeline.from_pretrained(ours, embodiment="gr1", device="cpu")
    observation = {"video.front": torch.rand(24, 32, 3), "state.a": torch.ones(2), "state.b": torch.ones(1)}
    told = {"task": "press the button", "noise": torch.randn(1, 5, 4)}
    assert torch.equal(again.predict_chunk(observation, **told), pipeline.predict_chunk(observation, **told))
    with pytest.raises(EmbodimentError, match="'gr2'"):
        PolicyPipeline.from_pretrained(ours, embodiment="gr2", device="cpu")


def test_robots_are_chosen_by_name(write):
    folder, sizes = write({"gr1": robot([2, 1], [2]), "new_embodiment": robot([3], [2])})
    with pytest.raises(EmbodimentError, match=r"No embodiment is chosen.*gr1, new_embodiment"):
        PolicyPipeline.from_pretrained(folder, device="cpu", tokenizer=TOKENIZER, **sizes)
    with pytest.raises(EmbodimentError, match="no embodiment 'gr2'"):
        PolicyPipeline.from_pretrained(folder, embodiment="gr2", device="cpu", tokenizer=TOKENIZER, **sizes)
    assert AutoPolicy.from_pretrained(folder, **sizes).config.input_features == {}
    assert AutoPolicy.from_pretrained(folder, embodiment="gr1", **sizes).config.state_dim == 3


def test_a_new_robot_for_fine_tuning(write, policy):
    """As a recipe starts from a base: the features are the dataset's, and the slot is that of new robots."""
    folder, sizes = write()
    features = {name: getattr(policy.config, name) for name in ("input_features", "output_features")}
    loaded = AutoPolicy.from_pretrained(folder, **features, **sizes)
    assert (loaded.config.embodiment_tag, loaded.config.embodiment_id) == ("new_embodiment", 1)
    assert loaded.config.state_parts is None
    assert loaded.action_head.state_encoder.layer1.W.requires_grad
    with pytest.raises(CheckpointError, match=r"from_config\(policy.config, dataset.statistics\)"):
        PolicyPipeline.from_pretrained(folder, device="cpu", tokenizer=TOKENIZER, **features, **sizes)


def test_no_tokenizer_is_in_the_folder(write):
    folder, sizes = write()
    with pytest.raises(MissingTokenizerError, match=str(folder)):
        PolicyPipeline.from_pretrained(folder, device="cpu", tokenizer=folder, **sizes)


def test_fields_change_at_loading(write):
    folder, sizes = write()
    policy = AutoPolicy.from_pretrained(
        folder, select_layer=1, tune_llm=True, tune_visual=False, action_horizon=3, mask_padding=True, **sizes
    )
    assert len(policy.backbone.eagle_model.language_model.layers) == 1
    assert policy.backbone.eagle_model.language_model.embed_tokens.weight.requires_grad
    assert not policy.backbone.eagle_model.mlp1[0].weight.requires_grad
    assert policy.predict_action_chunk(**policy.config.example_inputs(1)).shape == (1, 3, 4)
    assert policy.config.n_action_steps == 3
    assert policy.action_head.config.mask_padding


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"select_layer": 3}, "select_layer=3, but .* holds the language model's first 2 layers"),
        ({"action_dim": 7}, "action_dim=7, but the weights of .* have 4"),
        ({"max_state_dim": 7}, "max_state_dim=7, but the weights of .* have 6"),
        ({"max_num_embodiments": 9}, "max_num_embodiments=9, but the weights of .* have 3"),
        ({"project_to_dim": 32}, "projected from 32 to 32, but .* holds no weights for that"),
    ],
)
def test_fields_that_the_weights_do_not_fit(write, field, message):
    folder, sizes = write()
    with pytest.raises(InvalidConfigError, match=message):
        AutoPolicy.from_pretrained(folder, **field, **sizes)


def test_unknown_fields_are_refused(write):
    folder, sizes = write()
    with pytest.raises(UnknownConfigFieldError, match="select_layer"):
        AutoPolicy.from_pretrained(folder, select_layers=1, **sizes)


def test_the_type_of_the_weights(write, published):
    folder, sizes = write(torch_dtype="bfloat16")
    assert {p.dtype for p in AutoPolicy.from_pretrained(folder, **sizes).parameters()} == {torch.bfloat16}
    loaded = AutoPolicy.from_pretrained(folder, dtype=torch.float32, **sizes)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    halves = {name: value.to(torch.bfloat16) for name, value in published.items()}
    folder, sizes = write(weights=halves, torch_dtype=None)
    assert {p.dtype for p in AutoPolicy.from_pretrained(folder, **sizes).parameters()} == {torch.bfloat16}


def test_overwriting_the_files_does_not_change_a_loaded_policy(write):
    folder, sizes = write()
    loaded = AutoPolicy.from_pretrained(folder, **sizes)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    for path in folder.glob("model-*"):
        with open(path, "r+b") as file:  # as cp does: the same file with other bytes
            file.write(b"\x00" * path.stat().st_size)
            file.truncate(10)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_every_weight_is_needed(write, published):
    for name in (f"{MODEL}norm.weight", "action_head.future_tokens.weight", f"{EAGLE}mlp1.0.bias"):
        folder, sizes = write(weights={n: value for n, value in published.items() if n != name})
        ours = name.replace("language_model.model.", "language_model.")
        with pytest.raises(WeightsMismatchError, match=rf"{folder}[^\n]*\s+1 missing:\s+{ours}"):
            AutoPolicy.from_pretrained(folder, **sizes)
    folder, sizes = write(weights=published | {"action_head.stray": torch.zeros(1)})
    with pytest.raises(WeightsMismatchError, match=r"1 unexpected:\s+action_head.stray"):
        AutoPolicy.from_pretrained(folder, **sizes)


def test_head_alone_gives_the_word_embedding(published):
    both = rename_gr00t_weights(published)
    embedding = published.pop(f"{MODEL}embed_tokens.weight")
    alone = rename_gr00t_weights(published)
    assert both.keys() == alone.keys()
    name = f"{EAGLE}language_model.embed_tokens.weight"
    assert torch.equal(both[name], embedding)
    assert torch.equal(alone[name], embedding + 1.0)


def test_layers_beyond_the_selected_one_are_left_out(published, tiny_gr00t_n1_5):
    shallow = GR00TN1_5Policy(tiny_gr00t_n1_5(select_layer=1))
    load_published(shallow, published)
    load_published(shallow.backbone, published)
    load_published(shallow.action_head, published)
    shape = shallow.backbone.eagle_model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(shape, published[f"{MODEL}layers.0.mlp.up_proj.weight"])


def test_broken_folders(write):
    folder, sizes = write()
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match="model-00002"):
        AutoPolicy.from_pretrained(folder, **sizes)
    shard.unlink()
    with pytest.raises(MissingFileError, match="model-00002"):
        AutoPolicy.from_pretrained(folder, **sizes)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="weight_map"):
        AutoPolicy.from_pretrained(folder, **sizes)


def test_one_file_does_as_well(write, policy):
    folder, sizes = write()
    weights = {}
    for path in folder.glob("model-*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file({n: w.clone() for n, w in weights.items()}, folder / "model.safetensors")
    loaded = AutoPolicy.from_pretrained(folder, **sizes).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in policy.state_dict().items())


def test_a_field_that_is_not_known_is_refused_by_name(write):
    folder, sizes = write({}, action_head_delay=3)
    with pytest.raises(InvalidConfigError, match="action_head_delay=3, which this library does not know"):
        AutoPolicy.from_pretrained(folder, **sizes)
    folder, sizes = write({}, action_head_delay=None)
    head = json.loads((folder / "config.json").read_text())["action_head_cfg"]
    AutoPolicy.from_pretrained(folder, **sizes)
    folder, sizes = write({}, action_head_cfg=head | {"max_action_dim": 5})
    with pytest.raises(InvalidConfigError, match="action_dim=4 and max_action_dim=5, which are one width"):
        AutoPolicy.from_pretrained(folder, **sizes)
    folder, sizes = write({}, backbone_cfg={"select_layer": "two"})
    with pytest.raises(InvalidConfigError, match="select_layer='two' is no number"):
        AutoPolicy.from_pretrained(folder, **sizes)
