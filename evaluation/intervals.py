"""Confidence intervals of a success rate."""

from __future__ import annotations

from math import sqrt

from ..errors import InvalidEvaluationError


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate, as two fractions in [0, 1].

    Unlike the normal approximation it stays inside [0, 1] and keeps a width at 0 or `n` successes, where many
    robot evaluations end. With `n` = 0 nothing is known: (0, 1).

    Args:
        successes (`int`): episodes that succeeded, 0 to `n`.
        n (`int`): episodes in all.
        z (`float`, *optional*, defaults to 1.959963984540054): normal quantile of the level; the default is
            95 %.

    Raises:
        InvalidEvaluationError: `successes` is not within 0 … `n`, or `z` is negative.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if not 0 <= successes <= n:
        raise InvalidEvaluationError(f"{successes} successes of {n} episodes is impossible; expected 0 … {n}.")
    if z < 0:
        raise InvalidEvaluationError(f"z = {z} is negative; a 95 % interval has z = 1.96.")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    spread = 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / spread
    half_width = z / spread * sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # The bounds touch 0 and 1 exactly at the ends; rounding must not push them across.
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
