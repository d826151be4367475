"""GR00T's processors: pictures, prompts of the cameras that are there, states in parts, robots."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manipulators.configuration.gr00t_n1 import GR00TN1Config
from manipulators.configuration.gr00t_n1_5 import GR00TN1_5Config
from manipulators.errors import (
    CheckpointError,
    EmbodimentError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    MissingFeatureError,
    MissingStatisticsError,
    MissingTokenizerError,
    UnknownFeatureError,
)
from manipulators.processing.gr00t import GR00TN1_5Processor, GR00TN1Processor
from manipulators.processing.registry import processor_class as registered
from manipulators.processing.word_tokenizer import word_tokenizer

IMAGE, START = 4, 6  # ids of <IMG_CONTEXT> and <img> in a tokenizer of words
WRIST, ABOVE = "observation.images.wrist", "observation.images.above"
FIELDS = {
    "input_features": {
        WRIST: {"type": "VISUAL", "shape": (3, 10, 20)},
        ABOVE: {"type": "VISUAL", "shape": (3, 8, 8)},
        "observation.state": {"type": "STATE", "shape": (3,)},
    },
    "output_features": {"action": {"type": "ACTION", "shape": (2,)}},
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    "statistics": {
        "observation.state": {"min": [0.0, 0.0, 0.0], "max": [2.0, 4.0, 8.0]},
        "action": {"min": [0.0, -1.0], "max": [1.0, 1.0]},
    },
    "state_parts": {"arm": {"width": 2, "mode": "min_max"}, "grip": {"width": 1, "mode": "binary"}},
    "max_state_dim": 6,
    "max_action_dim": 4,
    "tokens_per_image": 3,
    "image_size": 8,
    "max_instruction_tokens": 4,
}
PROCESSORS = [GR00TN1_5Processor, GR00TN1Processor]


def build(processor_class=GR00TN1_5Processor, **fields):
    return processor_class(tokenizer=word_tokenizer(["press the button now"]), **FIELDS | fields)


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return build(request.param)


def observation(*leading):
    return {
        WRIST: np.full((*leading, 10, 20, 3), 255, dtype=np.uint8),
        ABOVE: np.zeros((*leading, 8, 8, 3), dtype=np.uint8),
        "observation.state": np.broadcast_to(np.array([1.0, 1.0, 1.0]), (*leading, 3)),
    }


def test_model_inputs(processor):
    actions = np.array([[[0.5, 0.5]] * 5] * 2)
    inputs = processor(observation(2), task=["press", "press the button"], actions=actions)
    length = inputs["input_ids"].shape[1]
    assert {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()} == {
        "pixel_values": ((2, 2, 3, 8, 8), torch.float32),
        "state": ((2, 6), torch.float32),
        "actions": ((2, 5, 4), torch.float32),
        "action_is_pad": ((2, 5), torch.bool),
        "action_mask": ((2, 5, 4), torch.bool),
        "input_ids": ((2, length), torch.int64),
        "attention_mask": ((2, length), torch.int64),
        "embodiment_id": ((2,), torch.int64),
    }
    white, black = inputs["pixel_values"].unbind(1)
    assert white.min() >= 1 - 2 / 255 and black.unique().tolist() == [-1]  # resized, white may lose one level
    torch.testing.assert_close(inputs["state"], torch.tensor([[0.0, -0.5, 1.0, 0, 0, 0]] * 2))
    torch.testing.assert_close(inputs["actions"], torch.tensor([[[0.0, 0.5, 0, 0]] * 5] * 2))
    assert inputs["action_mask"].tolist() == [[[True, True, False, False]] * 5] * 2
    assert inputs["embodiment_id"].tolist() == [31, 31]
    assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [6, 6]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [length - 2, length]


# --- pictures ---------------------------------------------------------------------------------------------


def test_every_kind_of_array(processor):
    """numpy, torch and PIL; height or channels first; bytes or fractions."""
    picture = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    expected = None
    for array in (
        picture,
        picture.transpose(2, 0, 1).copy(),
        torch.from_numpy(picture),
        Image.fromarray(picture),
        picture.astype(np.float32) / 255,
    ):
        found = processor(observation() | {WRIST: array}, task="press")["pixel_values"]
        expected = found if expected is None else expected
        assert torch.equal(found, expected)


# --- cameras ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_absent_camera_has_no_tokens(processor_class):
    """The prompt is that of a robot without it."""
    processor = build(processor_class, optional_cameras=[ABOVE])
    given = {name: value for name, value in observation(2).items() if name != ABOVE}
    inputs = processor(given, task="press")
    assert inputs["pixel_mask"].tolist() == [[True, False]] * 2
    assert inputs["pixel_values"].shape == (2, 2, 3, 8, 8) and inputs["pixel_values"][:, 1].unique() == -1
    assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [3, 3]
    cameras = {n: f for n, f in FIELDS["input_features"].items() if n != ABOVE}
    alone = build(processor_class, input_features=cameras)(given, task="press")
    assert torch.equal(inputs["input_ids"], alone["input_ids"])
    both = processor(observation(2), task="press")
    assert both["pixel_mask"].all() and (both["input_ids"] == IMAGE).sum(dim=1).tolist() == [6, 6]


@settings(max_examples=25, deadline=None)
@given(present=st.sets(st.sampled_from(["a", "b", "c"]), min_size=0), n1=st.booleans(), batch=st.integers(1, 3))
def test_as_many_image_tokens_as_pictures(present, n1, batch):
    names = [f"observation.images.{name}" for name in "abc"]
    features = {name: {"type": "VISUAL", "shape": (3, 6, 6)} for name in names}
    processor = build(
        PROCESSORS[n1],
        input_features=features | {"observation.state": {"type": "STATE", "shape": (3,)}},
        optional_cameras=names,
    )
    given = {f"observation.images.{name}": np.zeros((batch, 6, 6, 3), np.uint8) for name in present}
    inputs = processor(given | {"observation.state": np.zeros((batch, 3))}, task="press")
    tokens = (inputs["input_ids"] == IMAGE).sum(dim=1)
    assert torch.equal(tokens, inputs["pixel_mask"].sum(dim=1) * 3)
    assert (inputs["input_ids"] == START).sum(dim=1).tolist() == [len(present)] * batch


# --- instructions -----------------------------------------------------------------------------------------


def test_long_instructions_are_cut(processor):
    """To four tokens here; the frame and the pictures always stay."""
    long = processor.encode_instruction("press the button now now now", 1)["input_ids"]
    assert torch.equal(long, processor.encode_instruction("press the button now", 1)["input_ids"])
    assert not torch.equal(long, processor.encode_instruction("press the button", 1)["input_ids"])


def test_instructions_are_checked(processor):
    with pytest.raises(MissingFeatureError, match="lacks task"):
        processor(observation())
    with pytest.raises(FeatureShapeError, match="one for each of 1"):
        processor(observation(), task=["press", "now"])


# --- states and actions -----------------------------------------------------------------------------------


def test_state_in_parts(processor):
    given = observation(2)
    whole = processor(given, task="press")["state"]
    parts = {name: value for name, value in given.items() if name != "observation.state"}
    parts |= {"state.grip": given["observation.state"][:, 2:], "state.arm": given["observation.state"][:, :2]}
    assert torch.equal(processor(parts, task="press")["state"], whole)
    assert processor.raw_state(parts).shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state.arm": [0.0, 0.0]}, FeatureValueError, "holds observation.state twice, whole and as state.arm"),
        ({"observation.state": None, "state.arm": [0.0, 0.0]}, MissingFeatureError, "lacks state.grip"),
        (
            {"observation.state": None, "state.arm": [0.0], "state.grip": [0.0]},
            FeatureShapeError,
            "state.arm has shape .*last dimension of 2",
        ),
        (
            {"observation.state": None, "state.arm": [[0.0, 0.0]], "state.grip": [0.0]},
            FeatureValueError,
            "different leading dimensions: state.arm",
        ),
        ({"observation.state": None}, MissingFeatureError, "lacks observation.state"),
        ({"state.leg": [0.0]}, UnknownFeatureError, "'state.leg'"),
    ],
)
def test_states_that_do_not_fit(processor, changes, error, message):
    given = {name: value for name, value in (observation() | changes).items() if value is not None}
    with pytest.raises(error, match=message):
        processor(given, task="press")


def test_decoded_actions_have_no_padding(processor):
    chunk = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    chunk[..., 2:] = 9
    actions = processor.decode_actions(chunk)
    assert actions.dtype == torch.float32 and actions.tolist() == [[[0.5, 0.0]] * 5] * 2
    with pytest.raises(FeatureShapeError, match="a last dimension of 4, padding included"):
        processor.decode_actions(chunk[..., :2])


def test_actions_by_part():
    parts = {"arm": {"width": 1, "mode": "min_max"}, "grip": {"width": 1, "mode": "binary"}}
    processor = build(action_parts=parts)
    actions = processor.decode_actions(torch.tensor([[0.0, 0.9, 5.0, 5.0]]))
    split = {name: x.tolist() for name, x in processor.split_actions(actions).items()}
    assert split == {"action.arm": [[0.5]], "action.grip": [[1.0]]}


@settings(max_examples=40, deadline=None)
@given(
    fractions=st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=5),
    padding=st.integers(0, 3),
)
def test_actions_come_back(fractions, padding):
    """Whatever was demonstrated, through any padding."""
    processor = build(max_action_dim=2 + padding)
    actions = torch.tensor(fractions) * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, -1.0])  # (h, 2)
    inputs = processor(observation(), task="press", actions=actions)
    assert inputs["actions"].shape == (1, len(fractions), 2 + padding)
    assert not inputs["actions"][..., 2:].any() and not inputs["action_mask"][..., 2:].any()
    torch.testing.assert_close(processor.decode_actions(inputs["actions"])[0], actions, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_state_dim": 2}, "observation.state is 3 wide, the network's max_state_dim is 2"),
        ({"max_action_dim": 1}, "action is 2 wide, the network's max_action_dim is 1"),
        # Sines and cosines of two angles, and the gripper.
        (
            {"max_state_dim": 4, "state_parts": FIELDS["state_parts"] | {"arm": {"width": 2, "mode": "sin_cos"}}},
            "observation.state is 5 wide, the network's max_state_dim is 4",
        ),
        ({"state_parts": {"arm": {"width": 2, "mode": "min_max"}}}, "width 3, but its parts have 2"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        build(**fields)


def test_statistics_of_parts_become_those_of_the_feature():
    by_part = {"arm": {"min": [0.0, 0.0], "max": [2.0, 4.0]}, "grip": {"min": [0.0], "max": [8.0]}}
    statistics = {"state": by_part, "action": FIELDS["statistics"]["action"]}
    assert build(statistics=statistics).statistics == FIELDS["statistics"]


def test_statistics_that_a_part_needs():
    with pytest.raises(MissingStatisticsError, match=r"'arm' of observation\.state is normalised with min_max"):
        build(statistics={"action": FIELDS["statistics"]["action"]})
    # A gripper that is open or closed needs none, and neither do angles.
    parts = {"arm": {"width": 2, "mode": "sin_cos"}, "grip": {"width": 1, "mode": "binary"}}
    processor = build(statistics={"action": FIELDS["statistics"]["action"]}, state_parts=parts)
    state = processor(observation(), task="press")["state"][0]
    sine, cosine = np.sin(1.0), np.cos(1.0)
    torch.testing.assert_close(state.tolist(), [sine, sine, cosine, cosine, 1.0, 0.0], atol=1e-6, rtol=0)


def test_relative_actions():
    """The differences are what is normalised."""
    processor = build(relative_to=[0, None])
    inputs = processor(observation(), task="press", actions=[[1.5, 0.5]])
    torch.testing.assert_close(inputs["actions"], torch.tensor([[[0.0, 0.5, 0.0, 0.0]]]))
    decoded = processor.decode_actions(inputs["actions"], state=processor.raw_state(observation()))
    torch.testing.assert_close(decoded, torch.tensor([[[1.5, 0.5]]]))


# --- robots -----------------------------------------------------------------------------------------------


def test_slot_of_the_robot():
    processor = build(embodiment="gr1", embodiment_ids={"gr1": 24, "new_embodiment": 31})
    assert processor(observation(3), task="press")["embodiment_id"].tolist() == [24] * 3
    processor.choose_embodiment("gr1")
    with pytest.raises(EmbodimentError, match=r"no embodiment 'new_embodiment'.*statistics for: gr1"):
        processor.choose_embodiment("new_embodiment")
    with pytest.raises(EmbodimentError, match="no embodiment 'oxe'"):
        build(embodiment="oxe", embodiment_ids={"gr1": 24})


def test_one_of_several_robots():
    wide = FIELDS["statistics"] | {"action": {"min": [0.0, 0.0], "max": [10.0, 10.0]}}
    ids = {"small": 1, "wide": 2, "other": 3}
    robots = {"small": FIELDS["statistics"], "wide": wide}
    processor = build(embodiments=robots, statistics=None, embodiment="small", embodiment_ids=ids)
    decoded, slots = [], []
    for name in ("small", "wide"):
        processor.choose_embodiment(name)
        decoded.append(processor.decode_actions(torch.zeros(1, 4)).tolist())
        slots.append(processor(observation(), task="press")["embodiment_id"].item())
    assert decoded == [[[0.5, 0.0]], [[5.0, 5.0]]] and slots == [1, 2]
    with pytest.raises(EmbodimentError, match="There are statistics for: small, wide"):
        processor.choose_embodiment("other")


# --- policies ---------------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def tiny_config(config_class, **fields):
    """Return a config with pictures of 28 × 28, which are 4 tokens in N1.5 and 1 in N1."""
    vision = VISION | {"image_size": 28, "patch_size": 14}
    eagle = {"vision_config": vision, config_class.eagle_class.language_field: TEXT}
    if config_class is GR00TN1_5Config:
        eagle |= {"image_token_index": IMAGE}
        fields = {"project_to_dim": 2048} | fields
    else:
        fields = {"img_context_token_id": IMAGE, "projector_dim": 16} | fields
    fields = {"max_state_dim": 6, "action_dim": 4, "action_horizon": 5, "select_layer": 1} | fields
    features = {name: FIELDS[name] for name in ("input_features", "output_features", "state_parts")}
    return config_class(**features | {"eagle_config": eagle} | fields)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_processor_of_a_policy(processor_class):
    config_class = processor_class.policy_config
    config = tiny_config(config_class, embodiment_tag="gr1", image_crop_scale=0.5)
    words = word_tokenizer(["press the button"])
    assert registered(config) is processor_class
    processor = processor_class.from_config(config, FIELDS["statistics"], tokenizer=words)
    processor.check_agreement(config)
    inputs = processor(observation(2), task="press", actions=np.zeros((2, 5, 2)))
    example = config.example_inputs(2)
    assert inputs.keys() == example.keys() | {"action_mask"}
    for name in inputs.keys() - {"input_ids", "attention_mask", "action_mask"}:
        assert inputs[name].shape == example[name].shape, name
        assert inputs[name].dtype == example[name].dtype, name
    tokens = 4 if config_class is GR00TN1_5Config else 1
    assert (inputs["input_ids"] == config.image_token_index).sum(dim=1).tolist() == [2 * tokens] * 2
    assert inputs["embodiment_id"].tolist() == [24, 24]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_crop_scale": 0.9}, "image_crop_scale differ"),
        ({"max_state_dim": 7}, "max_state_dim differ"),
        ({"action_dim": 5}, "max_action_dim differ"),
        ({"max_instruction_tokens": 9}, "max_instruction_tokens differ"),
        ({"state_parts": None}, "state_parts differ"),
        ({"action_parts": {"hand": {"width": 2, "mode": "q99"}}}, "action_parts differ"),
        ({"embodiment_ids": {"new_embodiment": 30}}, "embodiment_ids differ"),
        ({"embodiment_tag": "gr1"}, "statistics of 'new_embodiment', the policy's embodiment_tag is 'gr1'"),
        ({"img_context_token_id": 5}, "<IMG_CONTEXT> has the id 4 in the tokenizer, but the policy looks for 5"),
    ],
)
def test_processor_of_another_policy(changes, message):
    processor = GR00TN1Processor.from_config(
        tiny_config(GR00TN1Config), FIELDS["statistics"], tokenizer=word_tokenizer(["press"])
    )
    with pytest.raises(CheckpointError, match=message):
        processor.check_agreement(tiny_config(GR00TN1Config, **changes))


def test_more_words_than_the_policy_has_embeddings_for():
    config = tiny_config(GR00TN1_5Config)
    words = word_tokenizer([" ".join(f"word{i}" for i in range(40))])
    processor = GR00TN1_5Processor.from_config(config, FIELDS["statistics"], tokenizer=words)
    with pytest.raises(CheckpointError, match="tokenizer has ids up to 48, the policy's language model 40 tokens"):
        processor.check_agreement(config)


# --- saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_round_trip(processor_class, tmp_path):
    processor = build(
        processor_class,
        action_parts={"b": {"width": 1, "mode": "min_max"}, "a": {"width": 1, "mode": "binary"}},
        embodiment="gr1",
        embodiment_ids={"new_embodiment": 31, "gr1": 24},
        optional_cameras=[ABOVE],
    )
    processor.save_pretrained(tmp_path)
    loaded = processor_class.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert list(loaded.action_parts) == ["b", "a"]
    expected = processor(observation(), task="press the button")
    found = loaded(observation(), task="press the button")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    chunk = torch.linspace(-1, 1, 12).reshape(3, 4)
    assert torch.equal(loaded.decode_actions(chunk), processor.decode_actions(chunk))


def test_contract_names_the_modes():
    text = str(build().contract())
    assert "observation.state  (3,)  arm (2) min_max, grip (1) binary" in text
    assert "action  (2,)  action (2) min_max" in text
    assert "Embodiment: new_embodiment" in text


def test_without_a_tokenizer():
    with pytest.raises(MissingTokenizerError, match="tokenizer=AutoTokenizer"):
        GR00TN1_5Processor(**FIELDS)


def test_published_sizes():
    sizes = [(p.tokens_per_image, p.image_size, p.max_state_dim) for p in map(_with_defaults, PROCESSORS)]
    assert sizes == [(256, 224, 64), (64, 224, 64)]


def _with_defaults(processor_class):
    names = ("input_features", "output_features", "normalization_mapping", "statistics")
    fields = {name: FIELDS[name] for name in names}
    return processor_class(tokenizer=word_tokenizer(["press"]), **fields)
