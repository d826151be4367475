"""Pictures resized with padding, or cropped and squeezed, with numbers that can be checked by hand."""

import pytest
import torch

from manipulators.processing.pictures import crop_and_resize, from_bytes, resize_with_padding


def test_wide_picture_is_padded_above_and_below():
    """4 × 8 → 2 × 4 inside 5 × 4: one row above, two below."""
    columns = torch.arange(8.0).expand(1, 1, 4, 8) / 8
    resized = resize_with_padding(columns, 5, 4)
    row = [1 / 16, 5 / 16, 9 / 16, 13 / 16]  # the mean of two neighbours each
    assert resized.shape == (1, 1, 5, 4)
    assert resized[0, 0].tolist() == [[0] * 4, row, row, [0] * 4, [0] * 4]


def test_tall_picture_is_padded_left_and_right():
    resized = resize_with_padding(torch.ones(2, 3, 7, 3), 7, 6)
    assert resized[0, 0].tolist() == [[0, 1, 1, 1, 0, 0]] * 7


def test_picture_padded_above_and_to_the_left_only():
    wide, tall = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 1)
    assert resize_with_padding(wide, 4, 4, centered=False)[0, 0].tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    assert resize_with_padding(tall, 3, 3, centered=False)[0, 0].tolist() == [[0, 0, 1]] * 3


def test_sizes_are_cut_not_rounded():
    """480 × 640 at 224 is 168 high; 479 is 167.65, which becomes 167."""
    for height, inside in ((480, 168), (479, 167)):
        resized = resize_with_padding(torch.ones(1, 1, height, 640), 224, 224)
        assert int(resized[0, 0, :, 0].sum()) == inside
        assert resized[0, 0, :28].sum() == 0 and resized[0, 0, 28].min() == 1


def test_nothing_is_smoothed():
    """Every fourth column is white: without antialiasing, a quarter of the size sees the gaps between them."""
    stripes = (torch.arange(16) % 4 == 0).float().expand(1, 1, 16, 16)
    assert resize_with_padding(stripes, 4, 4).unique().tolist() == [0]


def test_picture_of_the_right_size_stays():
    picture = torch.rand(1, 3, 6, 6)
    assert resize_with_padding(picture, 6, 6) is picture


# --- cropped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "crop", "kept"),
    [(8, 8, 0.5, (2, 6, 2, 6)), (10, 20, 0.95, (0, 9, 0, 19)), (240, 320, 0.95, (6, 234, 8, 312))],
)
def test_centre_is_kept(height, width, crop, kept):
    """What is cropped away is black: if it were seen, an edge would not be white. Halves are rounded to even."""
    top, bottom, left, right = kept
    picture = torch.zeros(1, 3, height, width)
    picture[..., top:bottom, left:right] = 1
    assert crop_and_resize(picture, crop, 4).min() >= 254
    assert crop_and_resize(picture, 1.0, 4).min() < 254


def test_levels_are_cut_off_not_rounded():
    level = torch.full((1, 3, 4, 4), 0.999)  # 254.7 of 255
    assert crop_and_resize(level, 1.0, 4).unique().tolist() == [254]
    assert crop_and_resize(torch.full((1, 3, 4, 4), 1.0005), 1.0, 4).unique().tolist() == [255]  # not 0
    assert crop_and_resize(torch.full((1, 3, 4, 4), -0.0005), 1.0, 4).unique().tolist() == [0]


def test_every_level_survives_where_nothing_is_resized():
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert crop_and_resize(levels, 1.0, 16)[0, 0].flatten().tolist() == list(range(256))


def test_resizing_smooths():
    """Of every four columns one is white: at a quarter of the size each pixel sees a quarter of white."""
    stripes = (torch.arange(16) % 4 == 0).float().expand(1, 3, 16, 16)
    seen = crop_and_resize(stripes, 1.0, 4)
    assert seen[..., 1:3].min() > 40 and seen[..., 1:3].max() < 90


def test_bytes_reach_from_minus_one_to_one():
    assert from_bytes(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


def test_a_picture_of_a_line_or_a_point_stays_one():
    assert resize_with_padding(torch.ones(1, 3, 1, 1000), 8, 8)[0, 0].sum(1).tolist() == [0, 0, 0, 8, 0, 0, 0, 0]
    assert crop_and_resize(torch.ones(1, 3, 1, 1), 0.95, 2).tolist() == [[[[255, 255]] * 2] * 3]
