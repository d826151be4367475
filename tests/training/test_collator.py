"""PolicyCollator: samples to a batch of model inputs."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from manipulators.errors import FeatureShapeError, InvalidConfigError, MissingFeatureError
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer
from manipulators.training.augmentation import Augmentation
from manipulators.training.collator import PolicyCollator

from .conftest import Demonstrations

POLICY_CASES = runpy.run_path(str(Path(__file__).parents[1] / "policy_cases.py"))


@pytest.fixture
def collator(make_policy, make_processor):
    return PolicyCollator(make_processor(make_policy(camera=True)))


def test_stacks_and_normalises_a_batch(collator, make_dataset):
    samples = make_dataset(3, camera=True).samples
    samples[1]["action_is_pad"][2:] = True
    batch = collator(samples)
    assert set(batch) == {"state", "pixel_values", "actions", "action_is_pad"}
    assert type(batch) is dict
    assert batch["state"].shape == (3, 3)
    assert batch["pixel_values"].shape == (3, 1, 3, 32, 32)
    assert batch["actions"].shape == (3, 4, 2)
    # mean 0, std 2; mean (1, -1), std (2, 0.5); pixels / 255 with mean 0.5, std 0.25
    torch.testing.assert_close(batch["state"][2], samples[2]["observation.state"] / 2)
    expected = (samples[1]["action"] - torch.tensor([1.0, -1.0])) / torch.tensor([2.0, 0.5])
    torch.testing.assert_close(batch["actions"][1], expected)
    pixels = (samples[0]["observation.images.top"] / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch["pixel_values"][0, 0], pixels)
    assert batch["action_is_pad"].tolist() == [[False] * 4, [False, False, True, True], [False] * 4]


def test_equals_processing_one_by_one(collator, make_dataset):
    samples = make_dataset(3, camera=True).samples
    together = collator(samples)
    for row, sample in enumerate(samples):
        for name, value in collator([sample]).items():
            torch.testing.assert_close(together[name][row], value[0], msg=name)


def test_leaves_out_what_the_policy_does_not_use(collator, make_dataset):
    samples = make_dataset(2, camera=True).samples
    plain = collator(samples)
    for sample in samples:
        sample["observation.images.wrist"] = torch.zeros(3, 8, 8, dtype=torch.uint8)
        sample["next.reward"] = torch.tensor(1.0)
        sample["observation.environment_state"] = torch.zeros(7)
    extended = collator(samples)
    assert extended.keys() == plain.keys()
    assert all(torch.equal(extended[name], plain[name]) for name in plain)


def test_samples_whose_columns_trainer_has_removed(collator):
    with pytest.raises(InvalidConfigError, match=r"only action_is_pad\..*remove_unused_columns=False"):
        collator([{"action_is_pad": torch.zeros(4, dtype=torch.bool)}])


def test_samples_are_renamed_as_observations_are(collator, make_dataset):
    samples = make_dataset(2, camera=True).samples
    plain = collator(samples)
    collator.processor.rename_map = {"observation.rgb": "observation.images.top"}
    renamed = [{n.replace("images.top", "rgb"): value for n, value in sample.items()} for sample in samples]
    assert torch.equal(collator(renamed)["pixel_values"], plain["pixel_values"])


def test_samples_without_a_task(collator, make_dataset):
    samples = make_dataset(2, camera=True).samples
    for sample in samples:
        del sample["task"]
    assert collator(samples)["actions"].shape == (2, 4, 2)


@pytest.mark.parametrize("name", ["observation.state", "observation.images.top", "action"])
def test_names_what_a_sample_lacks(collator, make_dataset, name):
    samples = make_dataset(2, camera=True).samples
    for sample in samples:
        del sample[name]
    with pytest.raises(MissingFeatureError, match=rf"lacks {name}\."):
        collator(samples)


def test_refuses_a_feature_of_another_width(collator, make_dataset):
    samples = make_dataset(2, camera=True).samples
    for sample in samples:
        sample["observation.state"] = torch.zeros(5)
    with pytest.raises(FeatureShapeError, match=r"observation\.state has shape \(2, 5\)"):
        collator(samples)


OPTIONAL = [name for name, case in POLICY_CASES["CASES"].items() if case.config().optional_cameras]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_camera_that_some_samples_lack_is_absent_from_those_alone(name, statistics_of):
    """Of a mixture, one dataset may lack it; the first sample of a batch does not decide for the others."""
    config = POLICY_CASES["CASES"][name].config()
    tokenizer = {"tokenizer": word_tokenizer(["push it"])} if config.reads_instruction else {}
    collator = PolicyCollator(processor_class(config).from_config(config, statistics_of(config), **tokenizer))
    (optional,) = config.optional_cameras
    lead = (config.n_obs_steps,) if config.n_obs_steps > 1 else ()
    samples = []
    for number in range(3):
        sample = {
            feature: torch.full((*lead, *shape.shape), 40 * (number + 1), dtype=torch.uint8)
            if len(shape.shape) == 3
            else torch.full((*lead, *shape.shape), number / 4)
            for feature, shape in config.input_features.items()
        }
        sample["action"] = torch.zeros(config.action_horizon, config.robot_action_dim)
        samples.append(sample | {"action_is_pad": torch.zeros(config.action_horizon).bool(), "task": "push it"})
    del samples[0][optional]  # the first one, and not the last

    mixture = ConcatDataset([Demonstrations(samples[:1]), Demonstrations(samples[1:])])
    (batch,) = DataLoader(mixture, batch_size=3, collate_fn=collator)
    view = list(config.image_features).index(optional)
    assert batch["pixel_mask"][:, view].tolist() == [False, True, True]
    for row, sample in enumerate(samples):
        alone = collator([sample])
        for key in ("pixel_mask", "state"):
            assert torch.equal(batch[key][row], alone[key][0])
        pixels, lone = batch["pixel_values"], alone["pixel_values"]
        views = zip(pixels, lone, strict=True) if isinstance(pixels, list) else [(pixels, lone)]
        assert all(torch.equal(picture[row], single[0]) for picture, single in views)
        if "input_ids" in batch:  # as many image tokens as the sample has pictures
            assert batch["attention_mask"][row].sum() == alone["attention_mask"].sum()
    for sample in samples[1:]:
        del sample[optional]
    assert not collator(samples)["pixel_mask"][:, view].any()


def test_a_camera_that_is_not_optional_is_missed_in_whichever_sample_lacks_it(collator, make_dataset):
    samples = make_dataset(3, camera=True).samples
    del samples[2]["observation.images.top"]
    with pytest.raises(MissingFeatureError, match=r"lacks observation\.images\.top\."):
        collator(samples)
    samples = make_dataset(3, camera=True).samples
    samples[1]["observation.images.top"] = torch.zeros(3, 64, 32, dtype=torch.uint8)
    with pytest.raises(FeatureShapeError, match=r"top has shape \(1, 3, 64, 32\); expected \(…, 3, 32, 32\)"):
        collator(samples)


def test_augmentation_varies_the_pictures_that_are_there(statistics_of):
    config = POLICY_CASES["CASES"]["act_optional_camera"].config()
    processor = processor_class(config).from_config(config, statistics_of(config))
    collator = PolicyCollator(processor, Augmentation(brightness=0.5))
    sample = {name: torch.full(f.shape, 100, dtype=torch.uint8) for name, f in config.image_features.items()}
    sample |= {"observation.state": torch.zeros(config.state_dim), "action": torch.zeros(config.chunk_size, 2)}
    sample["action_is_pad"] = torch.zeros(config.chunk_size).bool()
    lacking = {name: value for name, value in sample.items() if name not in config.optional_cameras}
    batch = collator([lacking, sample, sample])
    view = list(config.image_features).index(config.optional_cameras[0])
    pictures = batch["pixel_values"][:, view]
    assert batch["pixel_mask"][:, view].tolist() == [False, True, True]
    assert not pictures[0].any() and not torch.equal(pictures[1], pictures[2])
