"""Batches of a stream for a training: every process reads its share, pass after pass, and goes on at any step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from ..data.streaming.dataset import StreamingLeRobotDataset
from ..errors import InvalidConfigError
from .arguments import PolicyTrainingArguments


def require_steps(dataset: Any, arguments: PolicyTrainingArguments) -> None:
    """Check that a training on a stream says how long it is.

    Raises:
        InvalidConfigError: it counts epochs.
    """
    if isinstance(dataset, StreamingLeRobotDataset) and arguments.max_steps < 1:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        raise InvalidConfigError(
            f"A training on a stream counts steps, not epochs: set max_steps (train: --training.max_steps). One pass "
            f"over its {dataset.num_samples} samples takes {-(-dataset.num_samples // batch)} steps of {batch} "
            f"samples."
        )


def stream_batches(trainer: Trainer) -> DataLoader | None:
    """Return the training batches of this process, without end; None where the dataset is no stream.

    Samples are counted, and the order of a stream is known before it is read: a training that goes on skips the
    batches it has had without reading them, and the order does not depend on the number of workers.
    """
    stream, arguments, accelerator = trainer.train_dataset, trainer.args, trainer.accelerator
    if not isinstance(stream, StreamingLeRobotDataset):
        return None
    if stream.seed is None:
        stream = stream.seeded(arguments.seed if arguments.data_seed is None else arguments.data_seed)
    stream = stream.split(arguments.process_index, arguments.world_size)
    loader = DataLoader(
        _NumberedSamples(stream),
        batch_size=trainer._train_batch_size,
        sampler=_Counting(),
        collate_fn=trainer.data_collator,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
        worker_init_fn=partial(
            seed_worker, num_workers=arguments.dataloader_num_workers, rank=arguments.process_index
        ),
    )
    # The stream is split already, so accelerate only moves the batches to the device.
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


class _NumberedSamples(Dataset):
    """The samples of an endless stream by their numbers, which follow one another within a batch."""

    def __init__(self, stream: StreamingLeRobotDataset):
        self._stream = stream

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        return self._stream.run(numbers[0], numbers[-1] + 1)


class _Counting(Sampler[int]):
    """0, 1, 2, …; it has no length, so that a trainer counts steps."""

    def __iter__(self) -> Iterator[int]:
        return count()
