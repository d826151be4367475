"""π0's processor: pictures, instructions and padding, with numbers that can be checked by hand."""

import pytest
import torch
from tokenizers import AddedToken

from manipulators.errors import CheckpointError
from manipulators.processing.pi0 import PI0PolicyProcessor
from manipulators.processing.word_tokenizer import word_tokenizer

CAMERAS = {"wrist": (3, 4, 8), "above": (3, 28, 28)}


@pytest.fixture
def config(tiny_pi0):
    return tiny_pi0(CAMERAS, optional_cameras=("observation.images.above",))


@pytest.fixture
def processor(config, statistics_of):
    return PI0PolicyProcessor.from_config(config, statistics_of(config), tokenizer=word_tokenizer(["press it"]))


@pytest.fixture
def observation():
    return {"observation.state": torch.tensor([0.6, 0.35, 0.6]), "observation.images.wrist": torch.ones(3, 4, 8)}


# --- pictures ---------------------------------------------------------------------------------------------


def test_pictures_reach_from_minus_one_to_one(processor, observation):
    inputs = processor(observation, task="press it")
    assert inputs["pixel_values"].shape == (1, 2, 3, 28, 28)
    wrist, above = inputs["pixel_values"][0]
    torch.testing.assert_close(wrist[:, 7:21], torch.ones(3, 14, 28))
    assert wrist[:, :7].unique().tolist() == [-1]
    assert above.unique().tolist() == [-1]  # absent
    assert inputs["pixel_mask"].tolist() == [[True, False]]


# --- instructions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "prompt"), [("press it", "press it\n"), ("press it\n", "press it\n"), ("", "\n")])
def test_prompt_ends_with_one_line_break(processor, task, prompt):
    assert processor.instruction.prompt(task) == prompt


def test_instructions_cleaned_as_openpi_does(processor):
    processor.clean_instructions = True
    assert processor.instruction.prompt(" press_it\nnow\n") == "press it now\n"


# --- vectors ----------------------------------------------------------------------------------------------


def test_states_and_actions_are_normalised_then_padded(processor, observation):
    # mean 0.1, 0.35, 0.6 and std 0.5, 0.75, 1: see statistics_of
    actions = torch.tensor([[0.6, 1.1]] * 5)
    inputs = processor(observation, task="press it", actions=actions)
    torch.testing.assert_close(inputs["state"], torch.tensor([[1.0, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(inputs["actions"], torch.tensor([[[1.0, 1.0, 0, 0]] * 5]))
    assert inputs["action_mask"].tolist() == [[[True, True, False, False]] * 5]
    assert inputs["action_is_pad"].tolist() == [[False] * 5]
    torch.testing.assert_close(processor.decode_actions(inputs["actions"])[0], actions)


def test_round_trip(processor, config, observation, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = PI0PolicyProcessor.from_pretrained(tmp_path)
    loaded.check_agreement(config)
    assert loaded.to_dict() == processor.to_dict()
    for name, value in processor(observation, task="press it").items():
        assert torch.equal(loaded(observation, task="press it")[name], value), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_state_dim", 7),
        ("max_action_dim", 5),
        ("max_instruction_tokens", 9),
        ("image_resolution", (56, 56)),
        ("image_padding", "top_left"),
    ],
)
def test_processor_of_another_policy(processor, tiny_pi0, field, value):
    fields = {field: value}
    if field == "image_resolution":
        paligemma = tiny_pi0().paligemma_config
        fields["paligemma_config"] = paligemma | {"vision_config": paligemma["vision_config"] | {"image_size": 56}}
    other = tiny_pi0(CAMERAS, optional_cameras=("observation.images.above",), **fields)
    with pytest.raises(CheckpointError, match=f"{field} differ.*PI0PolicyProcessor.from_config"):
        processor.check_agreement(other)


def test_a_mark_of_the_tokenizer_that_no_instruction_holds_needs_no_embedding(tiny_pi0, statistics_of):
    """PaliGemma's own tokenizer has `<image>` right behind π0's vocabulary."""
    config = tiny_pi0()
    tokenizer = word_tokenizer([" ".join(f"word{i}" for i in range(config.vocabulary_size - 4))])
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    processor = PI0PolicyProcessor.from_config(config, statistics_of(config), tokenizer=tokenizer)
    processor.check_agreement(config)
    tokenizer.add_tokens(["one_more"])
    with pytest.raises(CheckpointError, match="ids up to 33, the policy's language model 32 tokens"):
        processor.check_agreement(config)
