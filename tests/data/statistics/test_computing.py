import numpy as np
import pytest

from manipulators.data.statistics.computing import ImageStatistics, compute_statistics, pool_statistics
from manipulators.errors import DatasetFormatError, InvalidFrameError


def test_numbers_by_hand():
    statistics = compute_statistics(np.array([[1.0], [2.0], [3.0], [6.0]]))
    by_hand = {"min": 1, "max": 6, "mean": 3, "std": np.sqrt(3.5), "count": 4, "q50": 2.5}
    by_hand |= {"q01": 1.03, "q10": 1.3, "q90": 5.1, "q99": 5.91}
    assert statistics.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert statistics[name].dtype == np.float32 and statistics[name].shape == (1,)
        assert statistics[name][0] == np.float32(value)


def test_a_constant_column_has_no_spread_at_all():
    values = np.full((1000, 2), 0.1)
    values[:, 1] = np.linspace(0, 1, 1000)
    assert values[:, 0].std() > 0  # what plain arithmetic gives
    statistics = compute_statistics(values)
    assert statistics["std"][0] == 0 and statistics["std"][1] > 0.28
    assert all(statistics[name][0] == np.float32(0.1) for name in ("min", "max", "mean", "q01", "q50", "q99"))


def test_images_count_every_pixel_as_numpy_would():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    images[..., 2] = 51
    pixels = images.reshape(-1, 3) / 255
    statistics = compute_statistics(images, visual=True)
    expected = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
    for name, probability in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        expected[name] = np.quantile(pixels, probability, axis=0)
    for name, value in expected.items():
        assert statistics[name].shape == (3, 1, 1)
        np.testing.assert_allclose(statistics[name].ravel(), value, atol=1e-6)
    assert statistics["count"].tolist() == [5]
    assert statistics["std"][2] == 0 and statistics["mean"][2] == np.float32(0.2)


def test_layouts_agree_and_parts_merge():
    images = np.random.default_rng(1).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    whole = compute_statistics(images.transpose(0, 3, 1, 2), visual=True)
    parts = [ImageStatistics(), ImageStatistics()]
    for image, part in zip(images, [0, 0, 0, 1], strict=True):
        parts[part].add(image)
    merged = ImageStatistics().merge(parts).compute()
    assert all(np.array_equal(merged[name], whole[name]) for name in whole)


def test_large_images_are_thinned():
    statistics = ImageStatistics()
    statistics.add(np.zeros((480, 640, 3), dtype=np.uint8))
    assert statistics.histogram[:, 0].tolist() == [160 * 214] * 3


def test_values_without_statistics():
    with pytest.raises(DatasetFormatError, match="no values"):
        compute_statistics(np.zeros((0, 2)))
    with pytest.raises(DatasetFormatError, match="Row 1"):
        compute_statistics(np.array([[0.0], [np.nan]]))
    with pytest.raises(InvalidFrameError, match="uint8"):
        compute_statistics(np.zeros((2, 4, 4, 3)), visual=True)


def test_pooled_by_hand():
    parts = [
        {"min": [0.0, 5.0], "max": [2.0, 5.0], "mean": [1.0, 5.0], "std": [1.0, 0.0], "count": [2]},
        {"min": [3.0, 5.0], "max": [6.0, 5.0], "mean": [4.0, 5.0], "std": [2.0, 0.0], "count": [4]},
    ]
    pooled = pool_statistics(parts)
    by_hand = {"min": [0, 5], "max": [6, 5], "mean": [3, 5], "std": [np.sqrt(5), 0], "count": [6]}
    assert pooled.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert pooled[name].dtype == np.float32
        assert pooled[name].tolist() == np.float32(value).tolist()


def test_pooled_is_exact_over_the_rows():
    values = np.random.default_rng(2).normal(3.0, 2.0, (30, 4))
    pooled = pool_statistics([compute_statistics(values[:7]), compute_statistics(values[7:])])
    whole = compute_statistics(values)
    for name in pooled:
        np.testing.assert_allclose(pooled[name], whole[name], rtol=1e-6)


def test_a_constant_stays_constant_when_pooled():
    parts = [compute_statistics(np.full((count, 1), 0.1)) for count in (4, 7, 10, 13, 16, 19)]
    pooled = pool_statistics(parts)  # plain arithmetic gives a std of 1e-17
    assert pooled["std"].tolist() == [0.0] and pooled["mean"][0] == np.float32(0.1)
