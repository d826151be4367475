"""Which steps of an episode belong to one sample: observation history and action horizon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..configuration.features import ACTION
from ..errors import TimeWindowError

OBSERVATION_PREFIX = "observation."


def sample_windows(
    features: Iterable[str],
    fps: float,
    action_horizon: int = 1,
    n_obs_steps: int = 1,
    delta_timestamps: Mapping[str, Sequence[float]] | None = None,
    tolerance_s: float = 1e-4,
) -> dict[str, np.ndarray]:
    """Return the steps of every feature that has a time dimension, relative to the sample's own step 0.

    ```text
    n_obs_steps = 2, action_horizon = 4      step   -1   0   1   2
                                      observation.*  o   o
                                             action  a   a   a   a
    ```

    Raises:
        TimeWindowError: a count below 1, or a timestamp that is no multiple of 1 / fps within `tolerance_s`.
    """
    for name, count in (("action_horizon", action_horizon), ("n_obs_steps", n_obs_steps)):
        if not isinstance(count, int) or count < 1:
            raise TimeWindowError(f"{name} must be a whole number of steps, at least 1; got {count!r}.")
    first = 1 - n_obs_steps
    windows = {}
    for name in features:
        if name == ACTION:
            windows[name] = np.arange(first, first + action_horizon)
        elif n_obs_steps > 1 and name.startswith(OBSERVATION_PREFIX):
            windows[name] = np.arange(first, 1)
    for name, seconds in (delta_timestamps or {}).items():
        windows[name] = _steps(name, seconds, fps, tolerance_s)
    return windows


def exact_times(stated: np.ndarray, frames: np.ndarray, fps: float) -> np.ndarray:
    """Return the times of frames as float64 [s]: number / fps, where that is the time stated but for its rounding.

    Timestamps are float32, which from 34 minutes on is coarser than 0.1 ms: a frame is found by its number then. A
    time that is further off says that the recording did not keep to its rate, and stays as it is.

    Args:
        stated (`np.ndarray`): (n,) times [s].
        frames (`np.ndarray`): (n,) the frames' numbers, from the same start.
        fps (`float`): frames per second.
    """
    stated, exact = np.asarray(stated, dtype=np.float64), np.asarray(frames, dtype=np.float64) / fps
    rounding = 2 * np.spacing(np.abs(stated).astype(np.float32)).astype(np.float64)
    return np.where(np.abs(stated - exact) <= rounding, exact, stated)


def _steps(name: str, seconds: Sequence[float], fps: float, tolerance_s: float) -> np.ndarray:
    exact = np.asarray(seconds, dtype=np.float64) * fps
    if exact.ndim != 1 or not exact.size:
        raise TimeWindowError(f"delta_timestamps[{name!r}] must be a list of seconds; got {seconds!r}.")
    steps = np.rint(exact)
    wrong = np.abs(exact - steps) / fps > tolerance_s
    if np.any(wrong):
        nearest = [round(float(step) / fps, 6) for step in steps]
        raise TimeWindowError(
            f"delta_timestamps[{name!r}] has {np.asarray(seconds)[wrong].tolist()}, which fall between the "
            f"frames at {fps:g} frames per second. The nearest list that does not: {nearest}."
        )
    return steps.astype(np.int64)
