"""PolicyCollator: dataset samples → one batch of model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration.features import ACTION, FeatureType
from ..errors import EmbodimentError, InvalidConfigError, MissingFeatureError
from ..processing.arrays import channels_first
from ..processing.groups import joined
from ..processing.processor import PolicyProcessor
from .augmentation import Augmentation, draws_for

IS_PAD = "action_is_pad"
DATASET_INDEX = "dataset_index"


class PolicyCollator:
    """Stack samples under the dataset's names and process them; features the policy does not use are left out.

    Args:
        processor: the policy's.
        augmentation: variation of the pictures, for training batches only. The draws depend on torch's seed when the
            collator is built.
        with_datasets: whether batches of a `MixtureDataset` say which sample is of which dataset, as `dataset_index`
            (b,), for the losses of each; a policy does not take it.
    """

    def __init__(
        self, processor: PolicyProcessor, augmentation: Augmentation | None = None, with_datasets: bool = False
    ):
        self.processor = processor
        self.augmentation = augmentation
        self.with_datasets = with_datasets
        self.seed = torch.initial_seed()
        self._of_robots: dict[str, PolicyProcessor] = {}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return model inputs (b, …) with their labels `actions` (b, h, a) and `action_is_pad` (b, h).

        Samples may be of several robots, in which case each names its `embodiment`, and their pictures of several
        sizes, layouts and types: those that are alike are processed together, as each would be alone.
        """
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
        tasks = [sample.get("task") for sample in samples]
        if None in tasks:
            tasks = self._without_some(tasks)
        groups: dict[tuple, list[int]] = {}
        for place, sample in enumerate(samples):
            groups.setdefault(self._kind(sample, names), []).append(place)
        batches = [
            self._processed([samples[i] for i in places], names, tasks and [tasks[i] for i in places])
            for places in groups.values()
        ]
        size = self.processor.reader.network_resizes_to
        batch = joined(batches, list(groups.values()), picture_size=size, **self._padding)
        if self.with_datasets and all("dataset_index" in sample for sample in samples):
            batch[DATASET_INDEX] = torch.stack([torch.as_tensor(sample["dataset_index"]) for sample in samples])
        return batch

    def _kind(self, sample: Mapping[str, Any], names: Sequence[str]) -> tuple:
        """Return what the samples of a group have in common: robot, shapes and types."""
        robot = self._robot_of(sample)
        described = ((name, sample[name]) for name in (*names, ACTION) if name in sample)
        return robot, *((name, tuple(value.shape), value.dtype) for name, value in described)

    def _robot_of(self, sample: Mapping[str, Any]) -> str | None:
        """Return the robot that a sample is of, where the processor knows several; else None.

        Raises:
            EmbodimentError: the processor serves another one.
        """
        named, known = sample.get("embodiment"), self.processor.embodiments
        if named is None or (not known and self.processor.embodiment is None):
            return None
        if named not in (known or (self.processor.embodiment,)):
            raise EmbodimentError(named, known or [self.processor.embodiment])
        return named if known else None

    def _processor_of(self, robot: str | None) -> PolicyProcessor:
        if robot is None:
            return self.processor
        if robot not in self._of_robots:
            self._of_robots[robot] = self.processor.for_embodiment(robot)
        return self._of_robots[robot]

    def _processed(
        self, samples: Sequence[Mapping[str, Any]], names: Sequence[str], tasks: list[str] | None
    ) -> dict[str, Any]:
        """Return the model inputs of samples that are alike."""
        observation = {name: _together([sample.get(name) for sample in samples]) for name in names}
        observation = {name: values for name, values in observation.items() if values is not None}
        if self.augmentation is not None:
            self._augment(observation)
        actions = _together([sample[ACTION] for sample in samples])  # (b, h, a)
        is_pad = _together([sample[IS_PAD] for sample in samples])  # (b, h)
        processor = self._processor_of(self._robot_of(samples[0]))
        return dict(processor(observation, task=tasks, actions=actions, action_is_pad=is_pad))

    @property
    def _padding(self) -> dict[str, Any]:
        """How prompts of different lengths are filled up."""
        instruction = self.processor.instruction
        if instruction is None:
            return {}
        return {"pad_token": instruction.tokenizer.pad_token_id or 0, "side": instruction.padding_side}

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


def _together(values: list[torch.Tensor | None]) -> torch.Tensor | list[torch.Tensor | None] | None:
    """Return the values of a batch as one tensor (b, …); where some are absent, as a list with None for them."""
    absent = sum(value is None for value in values)
    if absent == len(values):
        return None
    return values if absent else torch.stack(values)
