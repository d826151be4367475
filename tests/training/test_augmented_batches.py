"""The way of the augmentation: from the recipe through the Trainer into training batches only."""

import pytest
import torch

from manipulators.configuration.act import ACTConfig
from manipulators.errors import InvalidConfigError, InvalidRecipeError
from manipulators.modeling.policies.act import ACTPolicy
from manipulators.processing.processor import PolicyProcessor
from manipulators.training.arguments import PolicyTrainingArguments
from manipulators.training.augmentation import Augmentation
from manipulators.training.collator import PolicyCollator
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.trainer import PolicyTrainer

CAMERA = "observation.images.front"


class Frames(torch.utils.data.Dataset):
    """Four samples with a picture of 32 × 32, brighter to the right."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        ramp = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
        is_pad = torch.zeros(2, dtype=torch.bool)
        return {CAMERA: ramp, "action": torch.zeros(2, 1), "action_is_pad": is_pad}


@pytest.fixture(scope="module")
def policy():
    """An ACT policy of one small camera."""
    config = ACTConfig(
        input_features={CAMERA: {"type": "VISUAL", "shape": [3, 32, 32]}},
        output_features={"action": {"type": "ACTION", "shape": [1]}},
        normalization_mapping=dict.fromkeys(("VISUAL", "ACTION"), "IDENTITY"),
        chunk_size=2,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_vae=False,
        vision_config={"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        vision_norm="group",
        pretrained_backbone_weights=None,
    )
    return ACTPolicy(config)


def trainer(policy, folder, **kwargs):
    arguments = PolicyTrainingArguments(
        str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1, use_cpu=True
    )
    frames = Frames()
    processor = PolicyProcessor.from_config(policy.config)
    return PolicyTrainer(policy, arguments, processor, train_dataset=frames, eval_dataset=frames, **kwargs)


def first_columns(loader):
    """What stands in the leftmost pixel of every picture of the first batch."""
    batch = next(iter(loader))
    return (255 * batch["pixel_values"][:, 0, 0, 0, 0]).round().tolist()


def test_only_training_batches_vary(policy, tmp_path):
    run = trainer(policy, tmp_path, augmentation=Augmentation(shift=8))
    torch.manual_seed(0)
    trained = first_columns(run.get_train_dataloader())
    assert len(set(trained)) > 1
    assert all(0 <= value <= 8 for value in trained)
    assert first_columns(run.get_eval_dataloader()) == [0, 0, 0, 0]
    assert first_columns(trainer(policy, tmp_path).get_train_dataloader()) == [0, 0, 0, 0]


def test_pictures_with_channels_last_are_moved_along_the_same_axes(policy):
    collator = PolicyCollator(PolicyProcessor.from_config(policy.config), Augmentation(shift=8))
    samples = [Frames()[0]] * 4
    last = collator([{**sample, CAMERA: sample[CAMERA].movedim(0, -1)} for sample in samples])["pixel_values"]
    # (b, v, c, h, w): every row of every channel is the same ramp, moved to the side and nowhere else.
    assert last.shape == (4, 1, 3, 32, 32)
    assert torch.equal(last, last[:, :, :1, :1].expand_as(last))
    assert not torch.equal(last, last[:1].expand_as(last))


def test_a_batch_varies_by_seed_and_content_wherever_it_is_made(policy):
    def batch(seed, samples):
        torch.manual_seed(seed)
        collator = PolicyCollator(PolicyProcessor.from_config(policy.config), Augmentation(shift=8))
        torch.rand(7)  # what happens between does not matter
        return collator(samples)["pixel_values"]

    one, other = Frames()[0], {**Frames()[0], CAMERA: Frames()[0][CAMERA] + 1}
    assert torch.equal(batch(0, [one] * 8), batch(0, [one] * 8))
    assert not torch.equal(batch(0, [one] * 8), batch(1, [one] * 8))
    assert not torch.equal(255 * batch(0, [one] * 8), 255 * batch(0, [other] * 8) - 1)


def test_an_augmentation_beside_a_collator_is_refused(policy, tmp_path):
    with pytest.raises(InvalidConfigError, match=r"PolicyCollator\(processor, augmentation\)"):
        trainer(policy, tmp_path, augmentation=Augmentation(shift=1), data_collator=list)


def test_a_recipe_says_how():
    assert load_recipe("act_metaworld").augmentation is None
    overrides = [("augmentation.shift", "3"), ("augmentation.brightness", "2e-1")]
    assert load_recipe("act_metaworld", overrides).augmentation == Augmentation(shift=3, brightness=0.2)
    with pytest.raises(InvalidRecipeError, match="saturation"):
        load_recipe("act_metaworld", [("augmentation.saturatoin", "0.1")])
    with pytest.raises(InvalidRecipeError, match=r"^act_metaworld: augmentation: shift=-1 must be a number of pixels"):
        load_recipe("act_metaworld", [("augmentation.shift", "-1")])
