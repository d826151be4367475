import pytest

from manipulators.errors import InvalidEvaluationError
from manipulators.evaluation.intervals import wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (45, 50, 0.786398, 0.956524),
        (25, 50, 0.366445, 0.633555),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255289, 0.366210),  # Newcombe 1998, table I: 0.2553 to 0.3662
    ],
)
def test_published_and_hand_computed_bounds(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_is_symmetric_and_stays_inside():
    for successes in range(51):
        low, high = wilson_interval(successes, 50)
        mirrored_low, mirrored_high = wilson_interval(50 - successes, 50)
        assert 0 <= low <= successes / 50 <= high <= 1
        assert (low, high) == pytest.approx((1 - mirrored_high, 1 - mirrored_low))


def test_z_zero_is_the_rate_and_no_episodes_know_nothing():
    assert wilson_interval(3, 4, z=0) == (0.75, 0.75)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, -1)])
def test_impossible_counts_raise(successes, n):
    with pytest.raises(InvalidEvaluationError, match=f"{successes} successes of {n}"):
        wilson_interval(successes, n)
