import pytest
import torch

from manipulators.errors import InvalidConfigError
from manipulators.training.augmentation import Augmentation, jitter_colors, shift_images

GRID = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)


def pictures(*grids):
    """One grey picture (b, 3, h, w) per grid."""
    return torch.stack([grid.expand(3, *grid.shape) for grid in grids])


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ([0, 0], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ([1, 0], [[1, 2, 3], [1, 2, 3], [4, 5, 6]]),  # one down, the first row again
        ([0, -1], [[2, 3, 3], [5, 6, 6], [8, 9, 9]]),  # one to the left, the last column again
        ([-1, 2], [[4, 4, 4], [7, 7, 7], [7, 7, 7]]),
        ([5, -5], [[3, 3, 3], [3, 3, 3], [3, 3, 3]]),
    ],
)
def test_a_shift_moves_pixels_and_repeats_edges(offset, expected):
    moved = shift_images(pictures(GRID), torch.tensor([offset]))
    assert moved.dtype == torch.uint8
    assert moved[0].tolist() == [expected] * 3


def test_history_shares_the_shift_of_its_sample():
    history = torch.stack([pictures(GRID, GRID + 10), pictures(GRID + 20, GRID + 30)])  # (b, t, c, h, w)
    moved = shift_images(history, torch.tensor([[1, 0], [0, 1]]))
    assert moved[0, 1, 0].tolist() == [[11, 12, 13], [11, 12, 13], [14, 15, 16]]
    assert moved[1, 0, 0].tolist() == [[21, 21, 22], [24, 24, 25], [27, 27, 28]]


def test_samples_do_not_touch_each_other():
    images, order = noise(4, 3, 6, 5), torch.tensor([2, 0, 3, 1])
    offsets, factors = torch.tensor([[1, 2], [0, 0], [-3, 1], [2, -2]]), torch.tensor([0.5, 1.0, 1.5, 0.8])
    assert torch.equal(shift_images(images, offsets)[order], shift_images(images[order], offsets[order]))
    assert torch.equal(
        jitter_colors(images, contrast=factors)[order], jitter_colors(images[order], contrast=factors[order])
    )


def test_colours_by_hand():
    pixel = torch.tensor([100, 200, 50], dtype=torch.uint8).reshape(1, 3, 1, 1)

    def changed(**factors):
        return jitter_colors(pixel, **{name: torch.tensor([value]) for name, value in factors.items()}).flatten()

    assert changed(brightness=0.5).tolist() == [50, 100, 25]
    assert changed(brightness=2.0).tolist() == [200, 255, 100]
    # Grey is 0.299 · 100 + 0.587 · 200 + 0.114 · 50 = 153.
    assert changed(saturation=0.0).tolist() == [153, 153, 153]
    assert changed(saturation=0.6).tolist() == [121, 181, 91]  # 121.2, 181.2, 91.2
    two = torch.tensor([[0, 100]], dtype=torch.uint8).expand(1, 3, 1, 2)  # mean grey 50
    assert jitter_colors(two, contrast=torch.tensor([0.5]))[0, 0].tolist() == [[25, 75]]


def test_nothing_is_changed_by_default_or_by_factors_of_one():
    images = noise(2, 3, 4, 4)
    assert Augmentation()(images) is images
    one = torch.ones(2)
    assert torch.equal(jitter_colors(images, one, one, one), images)
    floats = images / 255
    torch.testing.assert_close(jitter_colors(floats, one, one, one), floats)


@pytest.mark.parametrize("as_float", [False, True])
def test_values_stay_in_range_and_type(as_float):
    images = noise(8, 2, 3, 9, 7)
    images = images / 255 if as_float else images
    varied = Augmentation(shift=3, brightness=1.0, contrast=1.0, saturation=1.0)(images)
    assert (varied.dtype, varied.shape) == (images.dtype, images.shape)
    assert varied.min() >= 0
    assert varied.max() <= (1 if as_float else 255)
    assert not torch.equal(varied, images)


def test_draws_differ_by_sample_and_follow_torch_s_seed():
    images = pictures(*[GRID] * 16)
    torch.manual_seed(0)
    first = Augmentation(shift=1)(images)
    torch.manual_seed(0)
    assert torch.equal(Augmentation(shift=1)(images), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 3
    assert set(first.flatten().tolist()) <= set(range(1, 10))


@pytest.mark.parametrize("values", [{"shift": -1}, {"brightness": 1.5}, {"saturation": -0.1}])
def test_impossible_values_raise(values):
    [(name, value)] = values.items()
    with pytest.raises(InvalidConfigError, match=f"^{name}={value} must"):
        Augmentation(**values)
