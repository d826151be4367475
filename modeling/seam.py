"""The seam between backbone and action head: what lets any backbone go with any head.

A backbone turns an observation into features, a head turns features into actions. `PolicyModel` writes `forward` and
`predict_action_chunk` once over these two; a policy whose backbone and head are one network implements `errors` and
`sample` itself.

Shapes: b batch, t observation history, v cameras, n tokens, d their width, h action horizon, a action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import FeatureShapeError, FeatureValueError, InvalidConfigError


class PolicyInputs(NamedTuple):
    """Hold an observation as the network reads it, normalised; None where the policy has no such input.

    Args:
        pixel_values: (b, v, c, h, w), with history (b, t, v, c, h, w); a list with an entry per camera where their
            sizes differ.
        pixel_mask: (b, v) bool, False where a camera is absent.
        state: (b, s), with history (b, t, s).
        environment_state: (b, e), with history (b, t, e).
        input_ids: (b, n) tokens of the instruction or prompt.
        attention_mask: (b, n), 0 where they are padded.
        embodiment_id: (b,) int64, the slot of each robot.
        extra: inputs of one backbone alone, by name; its config lists them in `other_inputs`.
    """

    pixel_values: torch.Tensor | list[torch.Tensor] | None = None
    pixel_mask: torch.Tensor | None = None
    state: torch.Tensor | None = None
    environment_state: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    embodiment_id: torch.Tensor | None = None
    extra: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> PolicyInputs:
        """Return the inputs of a mapping; names that are not shared by policies become `extra`."""
        shared = {name: inputs[name] for name in SHARED_INPUTS if name in inputs}
        return cls(**shared, extra={name: x for name, x in inputs.items() if name not in shared} or None)

    def given(self) -> dict[str, Any]:
        """Return what there is, by name."""
        named = {name: x for name, x in zip(SHARED_INPUTS, self, strict=False) if x is not None}
        return named | dict(self.extra or {})

    def in_dtype(self, dtype: torch.dtype) -> PolicyInputs:
        """Return them in the type of the weights that read them; batches come in float32."""

        def cast(value: Any) -> Any:
            return [x.to(dtype) for x in value] if isinstance(value, (list, tuple)) else value.to(dtype)

        names = ("pixel_values", "state", "environment_state")
        return self._replace(**{name: cast(x) for name in names if (x := getattr(self, name)) is not None})

    @property
    def first(self) -> torch.Tensor:
        """One of the inputs (b, …)."""
        found = next(iter(self.given().values()))
        return found[0] if isinstance(found, (list, tuple)) else found

    @property
    def batch_size(self) -> int:
        """b."""
        return len(self.first)


SHARED_INPUTS = PolicyInputs._fields[:-1]


class Labels(NamedTuple):
    """Hold what a policy is to learn.

    Args:
        actions: (b, h, a) normalised.
        action_is_pad: (b, h) bool, True where a step lies beyond the episode; None: nowhere.
        action_mask: (b, h, a), False in padded dimensions; None: those beyond the robot's action width.
    """

    actions: torch.Tensor
    action_is_pad: torch.Tensor | None = None
    action_mask: torch.Tensor | None = None


class Draws(NamedTuple):
    """Hold the random numbers of a pass; what is None is drawn.

    Args:
        noise: (b, h, a) to mix actions with, or to start sampling from (ACT: of the latent, (b, L)).
        time: (b,) in training, the flow time or timestep of the mixture.
        step_noise: (steps − 1, b, h, a), which samplers add that draw at every step.
        crop_offsets: (calls, 2) of training's crops, for backbones that crop at random.
        generator: of what sampling draws.
        num_steps: of sampling; None: the config's.
    """

    noise: torch.Tensor | None = None
    time: torch.Tensor | None = None
    step_noise: torch.Tensor | None = None
    crop_offsets: torch.Tensor | None = None
    generator: torch.Generator | None = None
    num_steps: int | None = None

    def checked(self) -> Draws:
        """Return them, once every one is of its type, and the steps of sampling are at least one.

        Shapes are checked where a draw is used.

        Raises:
            InvalidConfigError: one is of another.
            FeatureValueError: numbers of another dtype, NaN or infinite.
        """
        for name, value in self._asdict().items():
            kind = {"generator": torch.Generator, "num_steps": int}.get(name, torch.Tensor)
            if value is not None and not isinstance(value, kind):
                raise InvalidConfigError(f"{name}={value!r} is a {type(value).__name__}; expected {kind.__name__}.")
            if isinstance(value, torch.Tensor):
                whole = name == "crop_offsets" or (name == "time" and not value.is_floating_point())
                checked_draw(name, value, whole=whole)
        if self.num_steps is not None and self.num_steps < 1:
            raise InvalidConfigError(f"num_steps={self.num_steps} must be at least 1.")
        return self


def checked_draw(
    name: str, value: torch.Tensor, shape: tuple[int, ...] | None = None, whole: bool = False
) -> torch.Tensor:
    """Return random numbers that the caller gave, once they are numbers that a network can compute with.

    Args:
        name: of the argument.
        value: what was given.
        shape: what it has to be; None: any.
        whole: whether they are whole numbers, such as timesteps.

    Raises:
        FeatureShapeError: another shape.
        FeatureValueError: another kind of numbers, NaN or infinite.
    """
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise FeatureShapeError(name, tuple(value.shape), f"{tuple(shape)}")
    is_whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (is_whole if whole else value.is_floating_point()):
        example = "torch.int64" if whole else "torch.float32"
        raise FeatureValueError(
            f"{name} is {value.dtype}; expected {'whole' if whole else 'real'} numbers, {example}."
        )
    # Values are for the host to look at, which a compiled graph cannot do.
    if not (whole or value.is_meta or torch.compiler.is_compiling()) and not torch.isfinite(value).all():
        raise FeatureValueError(f"{name} holds NaN or infinity; expected finite numbers.")
    return value


class Features(NamedTuple):
    """Hold what a backbone makes of an observation.

    Args:
        tokens: (b, n, d).
        mask: (b, n), True or 1 where a token is real; None: everywhere.
        positions: (1, n, d), for heads that add them to their keys; None: there are none.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Backbone(Protocol):
    """Turn an observation into features; a `torch.nn.Module`.

    A component may also declare, as class attributes with names inside itself, `parameter_parts`, `lora_targets`,
    `modules_to_save`, `quantizable` and `stages` (see `parts`), and as methods what `PartlyFrozen` has. The policy
    collects them. One that leaves the robot's state out of its features says so: `reads_state = False`.
    """

    width: int  # d

    def encode(self, inputs: PolicyInputs) -> Features:
        """Return the features of an observation."""
        ...


class ActionHead(Protocol):
    """Turn features into actions; a `torch.nn.Module`. It may declare what a backbone may.

    One that reads the state beside the features says so: `reads_state = True`.
    """

    def errors(
        self, features: Features, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Return the named errors of a training pass, each (b, h, a) and unreduced."""
        ...

    def sample(self, features: Features, inputs: PolicyInputs, draws: Draws) -> torch.Tensor:
        """Return actions (b, h, a), normalised."""
        ...
