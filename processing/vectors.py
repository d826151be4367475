"""Vectors: states and actions, normalised, relative to the state, padded to the widths that a network has.

Shapes: b batch, h action horizon, a action width, s state width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..configuration.features import ACTION, ENVIRONMENT_STATE, STATE
from ..errors import FeatureShapeError, InvalidConfigError, MissingFeatureError
from .arrays import read_mask, read_vector, require_finite
from .observation import Observation, now
from .part import ProcessorPart
from .relative_actions import to_absolute, to_relative
from .robots import Robots


@dataclass(kw_only=True)
class Vectors(ProcessorPart):
    """Turn states and actions into what the network sees, and its chunks back into robot units.

    Args:
        robots: whose statistics normalise them.
        relative_to (`list[int | None]`, *optional*): per action dimension the state dimension that the network's
            actions are relative to, None where they are absolute; statistics of `action` are those of the
            differences. None: all are absolute.

    Raises:
        InvalidConfigError: `relative_to` does not fit the features.
    """

    robots: Robots
    relative_to: list[int | None] | None = None

    steep: ClassVar[tuple[str, ...]] = ()  # features that are normalised so, see `Normalizer.normalize`

    def __post_init__(self):
        if self.relative_to is None:
            return
        self.relative_to = list(self.relative_to)
        state = self.inputs.get(STATE)
        width = self.outputs[ACTION].shape[0]
        fits = state is not None and all(i is None or 0 <= i < state.shape[0] for i in self.relative_to)
        if len(self.relative_to) != width or not fits:
            raise InvalidConfigError(
                f"relative_to={self.relative_to} must name, for each of the {width} action dimensions, a dimension of "
                f"{STATE} ({state.shape[0] if state else 'which the policy lacks'}) or None."
            )

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return raw values (…, width) of a feature as the network sees them."""
        return self.robots.normalizer(name).normalize(x, name in self.steep)

    def encode_states(self, observation: Observation) -> dict[str, torch.Tensor]:
        """Return `state` (b, s) and `environment_state` (b, e), with history (b, t, …), as far as there are any.

        Raises:
            FeatureValueError: a value is so large that it becomes infinite.
        """
        names = {STATE: "state", ENVIRONMENT_STATE: "environment_state"}
        inputs = {ours: self.encode(name, observation[name]) for name, ours in names.items() if name in observation}
        for name, x in inputs.items():
            require_finite(f"{name}, normalised,", x)
        return inputs

    def encode_labels(self, actions: Any, action_is_pad: Any, observation: Observation) -> dict[str, torch.Tensor]:
        """Return `actions` (b, h, a) and `action_is_pad` (b, h); see `PolicyProcessor.__call__`.

        Raises:
            FeatureShapeError, FeatureValueError.
        """
        width = self.outputs[ACTION].shape[0]
        x = read_vector(ACTION, actions, width)
        x = x.unsqueeze(0) if x.ndim == 2 else x  # (b, h, a)
        if x.ndim != 3 or x.shape[0] != observation.batch_size:
            raise FeatureShapeError(ACTION, tuple(x.shape), f"({observation.batch_size}, horizon, {width})")
        if action_is_pad is None:
            is_pad = torch.zeros(x.shape[:2], dtype=torch.bool)
        else:
            is_pad = read_mask("action_is_pad", action_is_pad)
            is_pad = is_pad.unsqueeze(0) if is_pad.ndim == 1 else is_pad  # (b, h)
        if is_pad.shape != x.shape[:2]:
            raise FeatureShapeError("action_is_pad", tuple(is_pad.shape), f"{tuple(x.shape[:2])}")
        if self.relative_to is not None:
            x = to_relative(x, observation.state, self.relative_to)
        return {"actions": self.encode(ACTION, x), "action_is_pad": is_pad}

    def decode(self, chunk: torch.Tensor, state: Any = None, padded: bool = True) -> torch.Tensor:
        """Return a predicted chunk in robot units; see `PolicyProcessor.decode_actions`."""
        chunk = read_vector("The predicted chunk", chunk, self.outputs[ACTION].shape[0])
        actions = self.robots.normalizer(ACTION).unnormalize(chunk.cpu())
        if self.relative_to is None:
            return actions
        if state is None:
            raise MissingFeatureError([STATE], (), [STATE])
        state = read_vector(STATE, state, self.inputs[STATE].shape[0]).cpu()
        state = now(state.unsqueeze(0) if state.ndim == 1 else state)  # (b, s)
        chunks = actions.reshape(len(state), -1, actions.shape[-1])  # (b, h, a)
        return to_absolute(chunks, state, self.relative_to).view_as(actions)


@dataclass(kw_only=True)
class PaddedVectors(Vectors):
    """Pad normalised states and actions with zeros to the network's widths, and cut its chunks to the robot's.

    `action_mask` (b, h, a) says which dimensions of the labels are real.

    Args:
        max_state_dim (`int`, *optional*, defaults to 32): width of the network's states.
        max_action_dim (`int`, *optional*, defaults to 32): width of its actions.
        kwargs: what `Vectors` takes.

    Raises:
        InvalidConfigError: the robot's states or actions are wider.
    """

    max_state_dim: int = 32
    max_action_dim: int = 32

    config_fields: ClassVar[tuple[str, ...]] = ("max_state_dim", "max_action_dim")

    def __post_init__(self):
        super().__post_init__()
        for name, limit in self.padded_widths.items():
            width, field = self.robots.model_width(name), {STATE: "max_state_dim", ACTION: "max_action_dim"}[name]
            if width > limit:
                raise InvalidConfigError(f"{name} is {width} wide, the network's {field} is {limit}.")

    @property
    def padded_widths(self) -> dict[str, int]:
        """The widths that states and actions are padded to."""
        return {STATE: self.max_state_dim, ACTION: self.max_action_dim}

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return raw values (…, width) of a feature as the network sees them, padded."""
        x = super().encode(name, x)
        widths = self.padded_widths
        return F.pad(x, (0, widths[name] - x.shape[-1])) if name in widths else x

    def encode_labels(self, actions: Any, action_is_pad: Any, observation: Observation) -> dict[str, torch.Tensor]:
        """Return `actions` (b, h, a), `action_is_pad` (b, h) and `action_mask` (b, h, a)."""
        labels = super().encode_labels(actions, action_is_pad, observation)
        real = torch.arange(self.max_action_dim) < self.outputs[ACTION].shape[0]  # (a,)
        return labels | {"action_mask": real.expand_as(labels["actions"]).clone()}

    def decode(self, chunk: torch.Tensor, state: Any = None, padded: bool = True) -> torch.Tensor:
        """Return a predicted chunk (…, padded width) in robot units, without its padding."""
        if not padded:
            return super().decode(chunk, state)
        if chunk.shape[-1] != self.max_action_dim:
            expected = f"a last dimension of {self.max_action_dim}, padding included"
            raise FeatureShapeError("The predicted chunk", tuple(chunk.shape), expected)
        return super().decode(chunk[..., : self.outputs[ACTION].shape[0]], state)
