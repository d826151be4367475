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
from .arrays import read_image, read_vector, to_tensor
from .part import ProcessorPart, as_mapping

TASK = "task"
# What a dataset's item holds beside features. In an observation it is ignored.
_BOOKKEEPING = {"action", TASK, "timestamp", "frame_index", "episode_index", "index", "task_index"}


class Observation(dict[str, torch.Tensor]):
    """Hold a checked observation: feature → float32 tensor in raw units, (b, …), with history (b, t, …).

    Args:
        values: the features; optional cameras may be absent.
        steps: observations of history, t; 1 is no history, and no such dimension.
        batched: whether the arrays came with a batch dimension.
        task: the instruction that came with it, one or one each.
        present: of cameras that only some of the batch have: which (b,); there, the values of the others are zeros.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
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
    def state(self) -> torch.Tensor | None:
        """The robot's current state (b, s); None where it is not observed."""
        return now(self[STATE]) if STATE in self else None

    def has(self, name: str) -> torch.Tensor:
        """Return which of the batch have a feature, (b,)."""
        return self.present.get(name, torch.full((self.batch_size,), name in self))

    def copied(self) -> Observation:
        """Return an observation with tensors of its own."""
        values = {name: x.clone() for name, x in self.items()}
        return Observation(values, self.steps, self.batched, self.task, self.present)

    @classmethod
    def stacked(cls, history: Sequence[Observation]) -> Observation:
        """Return single observations, the oldest first, as one with history; a camera is there if it always was."""
        last = history[-1]
        names = [name for name in last if all(name in past for past in history)]
        values = {name: torch.stack([past[name] for past in history], dim=1) for name in names}
        present = {
            name: torch.stack([past.has(name) for past in history]).all(dim=0)
            for name in names
            if any(name in past.present for past in history)
        }
        return cls(values, len(history), last.batched, last.task, present)


@dataclass(kw_only=True)
class ObservationReader(ProcessorPart):
    """Read observations under the names and in the arrays that people pass.

    Args:
        n_obs_steps (`int`, *optional*, defaults to 1): observations the policy looks at.
        rename_map (`dict[str, str]`, *optional*): name in the observation → name of the feature.
        optional_cameras (`list[str]`, *optional*): cameras that an observation may lack.
        robots: whose state may come in parts.
        resizes_pictures: whether pictures may have any size, because the processor or the policy resizes them all.
    """

    robots: Any
    resizes_pictures: bool = False
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
        values: dict[str, torch.Tensor] = {}
        present: dict[str, torch.Tensor] = {}
        batched = None
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
            batched = x.ndim > len(feature.shape) if batched is None else batched
            values[name] = _with_leading_dimensions(name, x, len(feature.shape), steps)
        if not values:
            raise MissingFeatureError(self.inputs, renamed, self.inputs)
        sizes = {name: len(x) for name, x in values.items()}
        if len(set(sizes.values())) > 1:
            raise FeatureShapeError("The observation", tuple(sizes.values()), f"one batch size; {sizes}")
        return Observation(values, steps, batched, renamed.get(TASK), present)

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

    def leading_dimensions(self, observation: Mapping[str, Any]) -> tuple[int, ...]:
        """Return (b,), or () of a single observation; only shapes are read, those of the first feature present."""
        if isinstance(observation, Observation):
            return observation.leading[:1] if observation.batched else ()
        renamed = self.renamed(observation)
        for name, feature in self.inputs.items():
            if name in renamed and _is_absent_for_some(renamed[name]):
                return (len(renamed[name]),)
            if name in renamed:
                shape = tuple(to_tensor(name, renamed[name]).shape)
                return shape[: max(0, len(shape) - len(feature.shape))][:1]
        return ()

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


def _with_leading_dimensions(name: str, x: torch.Tensor, feature_ndim: int, steps: int) -> torch.Tensor:
    leading = x.ndim - feature_ndim
    if leading == 0:
        x = x.unsqueeze(0)  # (1, …): a batch of one
        return x.unsqueeze(1).expand(1, steps, *x.shape[1:]) if steps > 1 else x  # (1, t, …)
    expected = 1 if steps == 1 else 2
    if leading != expected or (expected == 2 and x.shape[1] != steps):
        history = f", then {steps} observations of history" if steps > 1 else ""
        raise FeatureShapeError(name, tuple(x.shape), f"no leading dimension, or batch{history}")
    return x
