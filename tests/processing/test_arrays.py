"""Whatever people hold an observation in, the same numbers come out; what is no observation is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from manipulators import PolicyFeature
from manipulators.errors import FeatureShapeError, FeatureValueError
from manipulators.processing.arrays import pixels, read_image, read_mask, read_vector

CAMERA = PolicyFeature("VISUAL", (3, 4, 6))
PIXELS = (np.arange(4 * 6 * 3) * 3 % 256).astype(np.uint8).reshape(4, 6, 3)  # h, w, c
EXPECTED = torch.from_numpy(PIXELS.transpose(2, 0, 1) / 255).float()


class Closed:
    """An object that fails when it is asked for its numbers."""

    def __array__(self, *_, **__):
        raise AttributeError("the device is closed")


READ_ONLY = PIXELS.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(PIXELS, id="numpy uint8 HWC"),
        pytest.param(PIXELS.transpose(2, 0, 1), id="numpy uint8 CHW, strided"),
        pytest.param(PIXELS / 255, id="float64 HWC"),
        pytest.param((PIXELS / 255).astype(np.float32).transpose(2, 0, 1), id="float32 CHW"),
        pytest.param(torch.from_numpy(PIXELS), id="torch uint8 HWC"),
        pytest.param(torch.from_numpy(PIXELS).permute(2, 0, 1).double() / 255, id="torch float64 CHW"),
        pytest.param(Image.fromarray(PIXELS), id="PIL"),
        pytest.param(READ_ONLY, id="read-only"),
        pytest.param(np.ascontiguousarray(PIXELS[::-1, ::-1])[::-1, ::-1], id="negative strides"),
        pytest.param(np.repeat(PIXELS, 2, axis=1)[:, ::2], id="every second column"),
        pytest.param((PIXELS / 255).tolist(), id="list of floats"),
    ],
)
def test_images(image):
    found = pixels(read_image("top", image, CAMERA))
    assert found.shape == (3, 4, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found, EXPECTED)


@pytest.mark.parametrize("image", [PIXELS, READ_ONLY, PIXELS[::-1, ::-1], (PIXELS / 255).astype(np.float32)])
def test_a_picture_is_checked_without_being_copied(image):
    found = read_image("top", image, CAMERA)
    assert found.dtype == image.dtype and np.shares_memory(found, image)


def test_lists_of_images_stack():
    for images in ([PIXELS, PIXELS], [Image.fromarray(PIXELS)] * 2, [torch.from_numpy(PIXELS)] * 2):
        torch.testing.assert_close(pixels(read_image("top", images, CAMERA)), torch.stack([EXPECTED] * 2))


def test_half_precision_images():
    found = pixels(read_image("top", (PIXELS / 255).astype(np.float16), CAMERA))
    torch.testing.assert_close(found, EXPECTED, atol=1e-3, rtol=0)


def test_images_are_not_changed():
    for image in (torch.from_numpy(PIXELS.copy()), EXPECTED.clone()):
        before = image.clone()
        pixels(read_image("top", image, CAMERA)).mul_(0.5).add_(1) if image.dtype == torch.uint8 else None
        assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS[:, :, 0], r"top has shape \(4, 6\); expected \(…, 3, 4, 6\) or \(…, 4, 6, 3\)"),
        (np.dstack([PIXELS, PIXELS[:, :, :1]]), r"\(4, 6, 4\)"),
        (PIXELS[:3], r"\(3, 6, 3\)"),
        (PIXELS.transpose(1, 0, 2), r"\(6, 4, 3\)"),
    ],
)
def test_images_of_another_size(image, message):
    with pytest.raises(FeatureShapeError, match=message):
        read_image("top", image, CAMERA)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.int64), "torch.int64; images are uint8"),
        (PIXELS.astype(bool), "torch.bool"),
        (PIXELS.astype(np.float32), "float pixels from 0 to 213; float images lie in"),
        (EXPECTED - 0.5, "float pixels from -0.5"),
        (np.full((3, 4, 6), np.nan), "top holds NaN or infinity"),
        (np.full((3, 4, 6), np.inf), "top holds NaN or infinity"),
        (torch.zeros(3, 4, 6, device="meta"), "is a meta tensor that cannot be read as numbers"),
        (torch.zeros(3, 4, 6).to_sparse(), "is a sparse tensor"),
        (torch.zeros(3, 4, 6).to(torch.float8_e4m3fn), "is a torch.float8_e4m3fn tensor"),
        ("top.png", "is a str that cannot be read"),
        (None, "is a NoneType that cannot be read"),
    ],
)
def test_impossible_images(image, message):
    with pytest.raises(FeatureValueError, match=message):
        read_image("top", image, CAMERA)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_empty_batch_of_images(kind):
    assert read_image("top", np.zeros((0, 4, 6, 3), kind), CAMERA).shape == (0, 3, 4, 6)


@pytest.mark.parametrize(
    "vector",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.float64),
        np.array([3.0, 2.0, 1.0])[::-1],
        np.array([1, 9, 2, 9, 3, 9], dtype=np.int16)[::2],
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        [np.float32(1), 2, np.float64(3)],
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
    ],
)
def test_vectors(vector):
    found = read_vector("state", vector, 3)
    assert found.dtype == torch.float32 and found.tolist() == [1, 2, 3] and not found.requires_grad


@pytest.mark.parametrize("vector", [[1, 2], [[1, 2, 3, 4]], 5.0, [], np.zeros((3, 1))])
def test_vectors_of_another_width(vector):
    with pytest.raises(FeatureShapeError, match="expected a last dimension of 3"):
        read_vector("state", vector, 3)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([0, 0, float("nan")], r"state holds NaN or infinity in dimensions \[2\]"),
        ([[0, 0, 0], [float("inf"), 0, float("-inf")]], r"dimensions \[0, 2\]"),
        ([1e39, 0, 0], r"dimensions \[0\]"),
        ("abc", "state is a str"),
        (None, "state is a NoneType"),
        ({"x": 1}, "state is a dict"),
        ([1, "a", 2], "state is a list"),
        ([[1, 2, 3], [1, 2]], "state is a list"),
        (np.array([1, 2, 3], dtype=">f4"), "byte order"),
        (np.array([1 + 1j, 2, 3]), "state"),
        (np.ma.masked_array([1.0, 2.0, 3.0], mask=[0, 1, 0]), "some of its values are masked"),
        (torch.zeros(3, device="meta"), "state is a meta tensor"),
        (Closed(), "state is a Closed that cannot be read as numbers: the device is closed"),
    ],
)
def test_impossible_vectors(vector, message):
    with pytest.raises(FeatureValueError, match=message):
        read_vector("state", vector, 3)


def test_masks_are_boolean():
    assert read_mask("pad", [True, False]).tolist() == [True, False]
    for mask in ([0, 1], np.array([0.0, 1.0]), torch.tensor([0, 1])):
        with pytest.raises(FeatureValueError, match="expected bool, True where a step is padding"):
            read_mask("pad", mask)
