"""Relative actions: what the network predicts as a difference to the state in which it predicts it.

A policy trained on differences can start anywhere; a gripper command, say, stays absolute. Statistics must be those
of the differences, so they are computed after the change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InvalidConfigError

# One entry per action dimension: the state dimension it is relative to, or None where it is absolute.
RelativeTo = Sequence[int | None]


def to_relative(actions: torch.Tensor, state: torch.Tensor, relative_to: RelativeTo) -> torch.Tensor:
    """Return actions (b, h, a) as differences to the current state (b, s); inverse of `to_absolute`."""
    return actions - _reference(state, relative_to)


def to_absolute(actions: torch.Tensor, state: torch.Tensor, relative_to: RelativeTo) -> torch.Tensor:
    """Return relative actions (b, h, a) in robot units, given the state (b, s) they were predicted in."""
    return actions + _reference(state, relative_to)


def _reference(state: torch.Tensor, relative_to: RelativeTo) -> torch.Tensor:
    columns = [torch.zeros_like(state[:, 0]) if i is None else state[:, i] for i in relative_to]
    return torch.stack(columns, dim=-1)[:, None]  # (b, 1, a)


def match_dimensions(
    action_names: Sequence[str] | None, state_names: Sequence[str] | None, widths: tuple[int, int]
) -> list[int | None]:
    """Return which state dimension each action dimension is relative to: the one of the same name.

    Args:
        action_names, state_names: names of the dimensions; without names, equal widths are matched in order.
        widths: of action and state.

    Raises:
        InvalidConfigError: nothing can be matched.
    """
    if action_names and state_names:
        places = {name: place for place, name in enumerate(state_names)}
        matched = [places.get(name) for name in action_names]
        if any(place is not None for place in matched):
            return matched
    elif widths[0] == widths[1]:
        return list(range(widths[0]))
    raise InvalidConfigError(
        f"Relative actions need state dimensions of the same names. Actions: {list(action_names or []) or widths[0]}; "
        f"state: {list(state_names or []) or widths[1]}. Say which one each is relative to, such as [0, 1, 2, null]."
    )
