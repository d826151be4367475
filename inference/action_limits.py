"""What an action may be: the range of the training data, and how far it may be from the one before.

Shapes: b batch, h action horizon, a action width, s state width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch

from ..configuration.contract import Dimension
from ..configuration.features import ACTION, STATE
from ..errors import InvalidConfigError, nearest
from ..processing.processor import PolicyProcessor
from ..processing.relative_actions import to_absolute, to_relative

# One number for all dimensions, one each, or some by name; in robot units.
ActionStep = float | Sequence[float] | Mapping[str, float]


class TrainingRange:
    """Compare actions in robot units with those of the training data; a relative dimension by its difference.

    Args:
        processor: whose statistics hold the range.
        limits: lowest and highest action (a,), those of differences in relative dimensions.
    """

    def __init__(self, processor: PolicyProcessor, limits: tuple[torch.Tensor, torch.Tensor]):
        self.low, self.high = limits
        self.relative_to = processor.relative_to
        self._margin = 0.01 * (self.high - self.low) + 1e-6  # a constant dimension keeps room for rounding

    def outside(self, actions: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Return how many actions of a chunk (b, h, a), predicted in a state (b, s), lie beyond it, (a,)."""
        x = actions if self.relative_to is None else to_relative(actions, state.cpu(), self.relative_to)
        return ((x < self.low - self._margin) | (x > self.high + self._margin)).flatten(0, 1).sum(0)

    def clamp(self, actions: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Return a chunk (b, h, a), predicted in a state (b, s), inside it."""
        if self.relative_to is None:
            return actions.clamp(self.low, self.high)
        state = state.cpu()
        differences = to_relative(actions, state, self.relative_to)
        return to_absolute(differences.clamp(self.low, self.high), state, self.relative_to)


class StepLimit:
    """Keep every action within a distance of the one before; the first one of the state, where the two compare.

    An action dimension compares with the state dimension that it is relative to, or else that of its name and, where
    both are recorded, its unit. The first action of the others is not limited.

    Args:
        step: see `ActionStep`; dimensions that a mapping leaves out are not limited.
        processor: which knows names and units.

    Raises:
        InvalidConfigError: a name that is no action's, another number of steps, or one that is not above 0.
    """

    def __init__(self, step: ActionStep, processor: PolicyProcessor):
        entries = {entry.name: entry.dimensions for entry in processor.contract().entries}
        actions, states = entries[ACTION], entries.get(STATE, ())
        self.step = torch.tensor(_steps(step, actions), dtype=torch.float32)  # (a,)
        places = processor.relative_to or [_place_of(action, states) for action in actions]
        self._places = [i or 0 for i in places]
        known = torch.tensor([i is not None for i in places])
        self._first_step = torch.where(known, self.step, math.inf) if known.any() else None

    def limited(self, action: torch.Tensor, before: torch.Tensor | None, state: torch.Tensor | None) -> torch.Tensor:
        """Return an action (b, a) that follows another one, or without one a state (b, s)."""
        if before is not None:
            return action.clamp(before - self.step, before + self.step)
        if state is None or self._first_step is None:
            return action
        start = state[:, self._places].cpu()  # (b, a)
        return action.clamp(start - self._first_step, start + self._first_step)

    def limited_chunk(self, actions: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Return a chunk (b, h, a) that begins in a state (b, s), one action after the other."""
        followed: list[torch.Tensor] = []
        for action in actions.unbind(1):
            followed.append(self.limited(action, followed[-1] if followed else None, state))
        return torch.stack(followed, dim=1)


def _place_of(action: Dimension, states: Sequence[Dimension]) -> int | None:
    """Return which state dimension an action dimension compares with."""
    for place, state in enumerate(states):
        units = {action.unit, state.unit} - {None}
        if action.name is not None and action.name == state.name and len(units) < 2:
            return place
    return None


def _steps(given: ActionStep, actions: Sequence[Dimension]) -> list[float]:
    """Return the step of every dimension, infinite where it is not limited."""
    names = [action.name or str(i) for i, action in enumerate(actions)]
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                known = nearest(str(name), names)
                raise InvalidConfigError(f"max_action_step names {name!r}, which is no action. {known}")
        steps = [given.get(name, math.inf) for name in names]
    elif isinstance(given, Real):
        steps = [given] * len(names)
    else:
        steps = list(given) if isinstance(given, Sequence) else [given]
    for step in steps:
        if not isinstance(step, Real) or isinstance(step, bool) or not step > 0:
            raise InvalidConfigError(
                f"max_action_step={given!r} must be above 0, in the action's units: the farthest that an action may "
                f"be from the one before. For example {{{names[0]!r}: 0.05}}, or 0.05 for all."
            )
    if len(steps) != len(names):
        raise InvalidConfigError(
            f"max_action_step has {len(steps)} numbers for {len(names)} actions: {', '.join(names)}."
        )
    return [float(step) for step in steps]
