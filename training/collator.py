"""PolicyCollator: dataset samples → one batch of model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration.features import ACTION, FeatureType
from ..errors import FeatureShapeError, InvalidConfigError, MissingFeatureError
from ..processing.arrays import channels_first
from ..processing.processor import PolicyProcessor
from .augmentation import Augmentation, draws_for

IS_PAD = "action_is_pad"


class PolicyCollator:
    """Stack samples under the dataset's names and process them; features the policy does not use are left out.

    Args:
        processor: the policy's.
        augmentation: variation of the pictures, for training batches only. The draws depend on torch's seed when the
            collator is built.
    """

    def __init__(self, processor: PolicyProcessor, augmentation: Augmentation | None = None):
        self.processor = processor
        self.augmentation = augmentation
        self.seed = torch.initial_seed()

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return model inputs (b, …) with their labels `actions` (b, h, a) and `action_is_pad` (b, h)."""
        samples = [self._renamed(sample) for sample in samples]
        optional = set(self.processor.optional_cameras)
        # Of a mixture of datasets, some may lack an optional camera: it is absent from their samples alone.
        names = [
            name
            for name in self.processor.input_features
            if name not in optional or any(name in sample for sample in samples)
        ]
        for sample in samples:
            missing = {name for name in (*names, ACTION, IS_PAD) if name not in sample} - optional
            if missing and not any(name in sample for name in names):
                raise InvalidConfigError(
                    f"The samples hold no observation, only {', '.join(sorted(sample)) or 'nothing'}. "
                    f"transformers.Trainer removes every column that forward does not name: pass "
                    f"TrainingArguments(remove_unused_columns=False), or use PolicyTrainingArguments."
                )
            if missing:
                raise MissingFeatureError(missing, sample, (*names, ACTION))
        observation = {name: _together(name, [sample.get(name) for sample in samples]) for name in names}
        if self.augmentation is not None:
            self._augment(observation)
        actions = _together(ACTION, [sample[ACTION] for sample in samples])  # (b, h, a)
        is_pad = _together(IS_PAD, [sample[IS_PAD] for sample in samples])  # (b, h)
        tasks = [sample.get("task") for sample in samples]
        if None in tasks:
            tasks = self._without_some(tasks)
        return dict(self.processor(observation, task=tasks, actions=actions, action_is_pad=is_pad))

    def _without_some(self, tasks: list[str | None]) -> None:
        """Accept that no sample has an instruction, or that the policy reads none.

        Raises:
            MissingFeatureError: some samples have one and some do not.
        """
        if self.processor.instruction is not None and any(task is not None for task in tasks):
            raise MissingFeatureError(["task"], (), ["task"], f"Sample {tasks.index(None)} of {len(tasks)}")

    def _renamed(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a sample under the names of the policy's features, as an observation on the robot is read."""
        return {self.processor.rename_map.get(name, name): value for name, value in sample.items()}

    def _augment(self, observation: dict[str, torch.Tensor]) -> None:
        """Replace the pictures of a batch by varied ones."""
        features = {name: self.processor.input_features[name] for name in observation}
        cameras = [name for name, feature in features.items() if feature.type is FeatureType.VISUAL]
        batches = {name: _given(observation[name]) for name in cameras}
        generator = draws_for(batches[cameras[0]], self.seed) if cameras else None
        for name, batch in batches.items():
            pictures = channels_first(name, batch, features[name], self.processor.reader.resizes_pictures)
            varied = self.augmentation(pictures, generator)
            if len(varied) == len(observation[name]):
                observation[name] = varied
                continue
            places = iter(varied)
            observation[name] = [None if picture is None else next(places) for picture in observation[name]]


def _given(pictures: torch.Tensor | list[torch.Tensor | None]) -> torch.Tensor:
    """Return the pictures of a batch that are there, (n, …)."""
    if isinstance(pictures, torch.Tensor):
        return pictures
    return torch.stack([picture for picture in pictures if picture is not None])


def _together(name: str, values: list[torch.Tensor | None]) -> torch.Tensor | list[torch.Tensor | None]:
    """Return the values of a batch as one tensor (b, …); where some are absent, as a list with None for them.

    Raises:
        FeatureShapeError: they have different shapes.
    """
    shapes = dict.fromkeys(tuple(value.shape) for value in values if value is not None)
    if len(shapes) > 1:
        first, other = list(shapes)[:2]
        raise FeatureShapeError(name, other, f"{first}, as another sample of the batch has: a batch has one shape")
    return values if any(value is None for value in values) else torch.stack(values)
