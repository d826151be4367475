"""PolicyCollator: dataset samples → one batch of model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration.features import ACTION, FeatureType
from ..errors import InvalidConfigError, MissingFeatureError
from ..processing.arrays import channels_first
from ..processing.processor import PolicyProcessor
from .augmentation import Augmentation, draws_for


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
        names = [
            n for n in self.processor.input_features if n in samples[0] or n not in self.processor.optional_cameras
        ]
        missing = {name for name in (*names, ACTION) if name not in samples[0]}
        if missing and not any(name in samples[0] for name in names):
            raise InvalidConfigError(
                f"The samples hold no observation, only {', '.join(sorted(samples[0])) or 'nothing'}. "
                f"transformers.Trainer removes every column that forward does not name: pass "
                f"TrainingArguments(remove_unused_columns=False), or use PolicyTrainingArguments."
            )
        if missing:
            raise MissingFeatureError(missing, samples[0], (*names, ACTION))
        observation = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        if self.augmentation is not None:
            self._augment(observation)
        actions = torch.stack([sample[ACTION] for sample in samples])  # (b, h, a)
        is_pad = torch.stack([sample["action_is_pad"] for sample in samples])  # (b, h)
        tasks = [sample["task"] for sample in samples] if "task" in samples[0] else None
        return dict(self.processor(observation, task=tasks, actions=actions, action_is_pad=is_pad))

    def _renamed(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a sample under the names of the policy's features, as an observation on the robot is read."""
        return {self.processor.rename_map.get(name, name): value for name, value in sample.items()}

    def _augment(self, observation: dict[str, torch.Tensor]) -> None:
        """Replace the pictures of a batch by varied ones."""
        features = {name: self.processor.input_features[name] for name in observation}
        cameras = [name for name, feature in features.items() if feature.type is FeatureType.VISUAL]
        generator = draws_for(observation[cameras[0]], self.seed) if cameras else None
        for name in cameras:
            pictures = channels_first(name, observation[name], features[name], self.processor.reader.resizes_pictures)
            observation[name] = self.augmentation(pictures, generator)
