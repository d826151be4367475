"""Observations: read and checked once, whatever arrays and names they come in.

Shapes: b batch, t observation history; a feature's own dimensions follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..configuration.features import STATE, FeatureType
from ..errors import FeatureShapeError, FeatureValueError, MissingFeatureError, UnknownFeatureError
from .arrays import Array, copied, read_image, read_vector, stacked, to_tensor
from .part import ProcessorPart, as_mapping

TASK = "task"
# What a dataset's item holds beside features. In an observation it is ignored.
_BOOKKEEPING = {"action", TASK, "timestamp", "frame_index", "episode_index", "index", "task_index"}


class Observation(dict[str, Array]):
    """Hold a checked observation: feature → tensor in raw units, (b, …), with history (b, t, …).

    Vectors are float32. Pictures (…, c, h, w) stay in the type in which they came, uint8 or float in [0, 1], and may
    be views of the caller's arrays: `arrays.pixels` converts those that a network is shown.

    Args:
        values: the features; optional cameras may be absent.
        steps: observations of history, t; 1 is no history, and no such dimension.
        batched: whether the arrays came with a batch dimension.
        task: the instruction that came with it, one or one each.
        present: of cameras that only some of the batch have: which (b,); there, the values of the others are zeros.
    """

    def __init__(
        self,
        values: Mapping[str, Array],
        steps: int = 1,
        batched: bool = True,
        task: str | Sequence[str] | None = None,
        present: Mapping[str, torch.Tensor] | None = None,
    ):
        super().__init__(values)
        self.steps, self.batched, self.task, self.present = steps, batched, task, dict(present or {})

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions of its tensors: (b,) or (b, t)."""
        first = next(iter(self.values()))
        return tuple(first.shape[: 1 if self.steps == 1 else 2])

    @property
    def batch_size(self) -> int:
        """The number of observations in it, b."""
        return self.leading[0]

    @property
    def batch(self) -> tuple[int, ...]:
        """(b,) where its arrays came with a batch dimension, else ()."""
        return self.leading[:1] if self.batched else ()

    @property
    def state(self) -> torch.Tensor | None:
        """The robot's current state (b, s); None where it is not observed."""
        return now(self[STATE]) if STATE in self else None

    def has(self, name: str) -> torch.Tensor:
        """Return which of the batch have a feature, (b,)."""
        return self.present.get(name, torch.full((self.batch_size,), name in self))

    @property
    def newest(self) -> Observation:
        """The current observation alone, without its history."""
        if self.steps == 1:
            return self
        return Observation({name: x[:, -1] for name, x in self.items()}, 1, self.batched, self.task, self.present)

    def copied(self) -> Observation:
        """Return an observation with tensors of its own."""
        values = {name: copied(x) for name, x in self.items()}
        return Observation(values, self.steps, self.batched, self.task, self.present)

    @classmethod
    def stacked(cls, history: Sequence[Observation]) -> Observation:
        """Return single observations, the oldest first, as one with history.

        It has the cameras of the last one. A camera that was away begins its history when it is back: its first
        picture is repeated, as at the beginning of an episode.
        """
        last = history[-1]
        values = {name: stacked(_since_it_is_there(name, history)) for name in last}
        return cls(values, len(history), last.batched, last.task, last.present)


def _since_it_is_there(name: str, history: Sequence[Observation]) -> list[Array]:
    """Return a feature of consecutive observations; before it came to stay, its first value."""
    values: list[Array] = []
    stays = history[-1].has(name)  # (b,)
    for past in reversed(history):
        stays = stays & past.has(name)
        if values and not stays.any():
            values.append(values[-1])
        elif values and not stays.all():
            here = stays.reshape(-1, *[1] * (past[name].ndim - 1))
            values.append(torch.where(here, *stacked([past[name], values[-1]]).unbind(1)))
        else:
            values.append(past[name])
    return values[::-1]


@dataclass(kw_only=True)
class ObservationReader(ProcessorPart):
    """Read observations under the names and in the arrays that people pass.

    Args:
        n_obs_steps (`int`, *optional*, defaults to 1): observations the policy looks at.
        rename_map (`dict[str, str]`, *optional*): name in the observation → name of the feature.
        optional_cameras (`list[str]`, *optional*): cameras that an observation may lack.
        robots: whose state may come in parts.
        resizes_pictures: whether pictures may have any size, because the processor or the policy resizes them all.
        network_resizes_to: the size to which the policy does.
    """

    robots: Any
    resizes_pictures: bool = False
    network_resizes_to: tuple[int, int] | None = None
    n_obs_steps: int = 1
    rename_map: dict[str, str] = field(default_factory=dict)
    optional_cameras: list[str] = field(default_factory=list)

    config_fields: ClassVar[tuple[str, ...]] = ("n_obs_steps", "optional_cameras")

    def __post_init__(self):
        self.rename_map = dict(as_mapping("rename_map", self.rename_map))
        self.optional_cameras = list(self.optional_cameras or [])

    def read(self, observation: Mapping[str, Any], steps: int) -> Observation:
        """Return the features of an observation as checked tensors.

        Args:
            observation: as in `PolicyProcessor.__call__`; one that was read with as many steps is returned as it is.
            steps: how many observations of history the arrays hold; a single one is repeated to fill them.

        Raises:
            MissingFeatureError, UnknownFeatureError, FeatureShapeError, FeatureValueError.
        """
        if isinstance(observation, Observation) and observation.steps == steps:
            return observation
        renamed = self.renamed(observation)
        self._check_names(renamed)
        values: dict[str, Array] = {}
        present: dict[str, torch.Tensor] = {}
        batched: dict[str, bool] = {}
        for name, feature in self.inputs.items():
            if name not in renamed:
                continue
            if _is_absent_for_some(renamed[name]):
                given = [picture is not None for picture in renamed[name]]
                if name not in self.optional_cameras:
                    lacking = f"Observation {given.index(False)} of {len(given)}"
                    raise MissingFeatureError([name], renamed.keys() - {name}, self.inputs, lacking)
                if not any(given):
                    continue
                renamed = {**renamed, name: _filled_in(name, renamed[name])}
                present[name] = torch.tensor(given)
            if feature.type is FeatureType.VISUAL:
                x = read_image(name, renamed[name], feature, self.resizes_pictures)
            else:
                x = read_vector(name, renamed[name], feature.shape[0])
            batched[name] = x.ndim > len(feature.shape)
            values[name] = _with_leading_dimensions(name, x, len(feature.shape), steps)
        if not values:
            raise MissingFeatureError(self.inputs, renamed, self.inputs)
        sizes = {name: len(x) for name, x in values.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise FeatureShapeError("The observation", tuple(sizes.values()), f"one batch size, at least 1; {sizes}")
        if len(set(batched.values())) > 1:
            having = ", ".join(name for name, has_one in batched.items() if has_one)
            raise FeatureValueError(
                f"Of the observation's features only {having} {'have' if ',' in having else 'has'} a batch dimension; "
                f"expected one in all of them, or in none."
            )
        return Observation(values, steps, next(iter(batched.values())), renamed.get(TASK), present)

    def renamed(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an observation under the features' names, a state that comes in parts as one vector.

        Raises:
            FeatureValueError: it is no mapping, holds a feature twice, or parts that do not fit together.
            MissingFeatureError: some parts of the state are absent.
        """
        if not isinstance(observation, Mapping):
            raise FeatureValueError(
                f"An observation is a mapping of feature names to arrays; got {type(observation).__name__}."
            )
        renamed: dict[str, Any] = {}
        for name, value in observation.items():
            if not isinstance(name, str):
                raise FeatureValueError(f"An observation's features have names, such as {STATE!r}; got {name!r}.")
            feature = self.rename_map.get(name, name)
            if feature in renamed:
                names = [given for given in observation if self.rename_map.get(given, given) == feature]
                raise FeatureValueError(f"The observation holds {feature} twice, as {' and as '.join(names)}.")
            renamed[feature] = value
        return self._with_whole_state(renamed)

    def _check_names(self, renamed: Mapping[str, Any]) -> None:
        missing = self.inputs.keys() - renamed.keys() - set(self.optional_cameras)
        if missing:
            raise MissingFeatureError(missing, renamed, self.inputs)
        for name in renamed.keys() - self.inputs.keys() - _BOOKKEEPING:
            if not str(name).endswith("_is_pad"):
                raise UnknownFeatureError(str(name), self.inputs)

    def _with_whole_state(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        widths = self.robots.state_part_widths() if STATE in self.inputs else {}
        given = [name for name in widths if name in observation]
        if not given:
            return observation
        if STATE in observation:
            raise FeatureValueError(f"The observation holds {STATE} twice, whole and as {', '.join(given)}.")
        if len(given) < len(widths):
            raise MissingFeatureError(widths.keys() - set(given), observation, widths)
        vectors = [read_vector(name, observation[name], width) for name, width in widths.items()]
        if len({vector.shape[:-1] for vector in vectors}) > 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(widths, vectors, strict=True))
            raise FeatureValueError(f"The parts of the state have different leading dimensions: {shapes}.")
        others = {name: value for name, value in observation.items() if name not in widths}
        return others | {STATE: torch.cat(vectors, dim=-1)}


def _is_absent_for_some(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(item is None for item in value)


def _filled_in(name: str, pictures: Sequence[Any]) -> list[torch.Tensor]:
    """Return a batch of pictures with zeros for those that are None."""
    like = torch.zeros_like(to_tensor(name, next(picture for picture in pictures if picture is not None)))
    return [like if picture is None else to_tensor(name, picture) for picture in pictures]


def now(state: torch.Tensor) -> torch.Tensor:
    """Return the current state (b, s) of a history (b, t, s), or the state itself."""
    return state[:, -1] if state.ndim == 3 else state


def _with_leading_dimensions(name: str, x: Array, feature_ndim: int, steps: int) -> Array:
    leading = x.ndim - feature_ndim
    if leading == 0:
        return stacked([x[None]] * steps) if steps > 1 else x[None]  # (1, t, …) or (1, …): a batch of one
    expected = 1 if steps == 1 else 2
    if leading != expected or (expected == 2 and x.shape[1] != steps):
        history = f", then {steps} observations of history" if steps > 1 else ""
        raise FeatureShapeError(name, tuple(x.shape), f"no leading dimension, or batch{history}")
    return x
