"""PolicyCollator: samples to a batch of model inputs."""

import pytest
import torch

from manipulators.errors import FeatureShapeError, InvalidConfigError, MissingFeatureError
from manipulators.training.collator import PolicyCollator


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
