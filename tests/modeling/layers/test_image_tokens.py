"""Pictures inside a prompt: which are real, how patches become tokens, and where those stand."""

import pytest
import torch

from manipulators.errors import FeatureShapeError, ImageTokenError
from manipulators.modeling.layers.image_tokens import pixel_shuffle, place_pictures, real_pictures


def test_neighbouring_patches_become_one_token():
    patches = torch.arange(16)[None, :, None].float()  # a picture of 4 × 4 patches, each its number
    shuffled = pixel_shuffle(patches, 2)
    assert shuffled.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_the_channels_of_a_patch_stay_together():
    patches = torch.arange(2 * 36 * 5).reshape(2, 36, 5)
    shuffled = pixel_shuffle(patches, 3)
    assert shuffled.shape == (2, 4, 45)
    assert torch.equal(shuffled[1, 3, -5:], patches[1, 35])
    assert torch.equal(pixel_shuffle(patches, 1), patches)


IDS = torch.tensor([[0, 9, 9, 1], [9, 9, 9, 9]])


def test_pictures_stand_where_their_tokens_are():
    words = torch.zeros(2, 4, 1)
    pictures = torch.arange(1.0, 7.0).reshape(3, 2, 1)
    assert place_pictures(words, pictures, IDS, 9)[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert words.abs().sum() == 0
    assert place_pictures(words.bfloat16(), pictures, IDS, 9).dtype == torch.bfloat16


@pytest.mark.parametrize("pictures", [2, 4])
def test_too_many_or_too_few_pictures_are_refused(pictures):
    with pytest.raises(ImageTokenError, match=rf"\[2, 4\] image tokens \(id 9\); expected 2 .* {2 * pictures} in all"):
        place_pictures(torch.zeros(2, 4, 1), torch.ones(pictures, 2, 1), IDS, 9)


def test_a_picture_does_not_end_in_the_next_prompt():
    """As many in all, but not in each: the second prompt would see the end of the first one's picture."""
    with pytest.raises(ImageTokenError, match=r"\[1, 3\]"):
        place_pictures(torch.zeros(2, 4, 1), torch.ones(2, 2, 1), torch.tensor([[0, 0, 9, 0], [9, 9, 9, 0]]), 9)


def test_no_pictures():
    words = torch.ones(1, 3, 2)
    assert torch.equal(place_pictures(words, torch.zeros(0, 4, 2), torch.tensor([[1, 2, 3]]), 9), words)


def test_absent_cameras_are_left_out():
    pixel_values = torch.arange(6.0).reshape(2, 3, 1, 1, 1).expand(2, 3, 3, 2, 2)
    present = torch.tensor([[True, False, True], [False, True, True]])
    assert real_pictures(pixel_values, present)[:, 0, 0, 0].tolist() == [0, 2, 4, 5]
    assert real_pictures(pixel_values).shape == (6, 3, 2, 2)
    flat = torch.zeros(4, 3, 2, 2)
    assert real_pictures(flat) is flat


@pytest.mark.parametrize(
    ("shape", "mask", "match"),
    [
        ((2, 3, 3, 2, 2), (2, 2), r"pixel_mask has shape \(2, 2\); expected \(2, 3\)"),
        ((6, 3, 2, 2), (2, 3), r"pixel_values has shape \(6, 3, 2, 2\)"),
        ((3, 2, 2), None, r"pixel_values has shape \(3, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_belong_together(shape, mask, match):
    with pytest.raises(FeatureShapeError, match=match):
        real_pictures(torch.zeros(shape), None if mask is None else torch.ones(mask))
