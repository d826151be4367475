"""StreamingLeRobotDataset: samples of a dataset that is too large to be downloaded whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ...errors import InvalidConfigError, StreamError
from ..checks import check_size
from ..dataset import LeRobotDataset
from ..table.fingerprint import fingerprint
from .file_cache import FileCache
from .files_on_demand import FilesOnDemand, TableOnDemand
from .order import StreamOrder

_TOGETHER = 16  # samples that are decoded with one call, and that one worker reads before the next does


class StreamingLeRobotDataset(LeRobotDataset, IterableDataset):
    """Read the samples of a LeRobot dataset one after the other, downloading files when their turn comes.

    The samples are those of `LeRobotDataset`, to the bit. `for sample in dataset` is one pass. Files are shuffled in
    every pass, episodes within files, and samples in blocks of `shuffle_buffer`; `set_epoch` chooses the pass. Only
    numbers wait in that buffer: a frame is decoded when its sample's turn comes. The next block's files are fetched
    while a block is read. No file is read whole into memory, and those not needed any more leave the cache.

    The workers of a DataLoader take turns, so that no sample is lost or doubled. `split` does the same for processes:
    their shares of a pass differ by at most one sample; nothing is dropped or repeated to make them equal. Where
    every process must take as many steps, use `repeat()` and count steps, as `PolicyTrainer` does by itself.
    transformers' own Trainer reads a stream in the first process and deals its batches out.

    `state_dict` and `load_state_dict` go on in the middle of a pass without reading what comes before. A stream has
    no length and no sample number 3; `num_frames` counts frames, `max_steps` a training.

    Args:
        source (`str` or `Path`): a Hub id such as `"lerobot/droid_1.0.1"`, or a local folder.
        shuffle_buffer (`int`, *optional*, defaults to 10000): samples that are shuffled together; 0 keeps the order
            of the dataset. The files of two such blocks have to fit into the cache.
        seed (`int`, *optional*): of the order; 0 by default, in a `PolicyTrainer` its data seed.
        cache_gb (`float`, *optional*, defaults to 20): size of the files that are kept [GB].
        cache_folder (`str` or `Path`, *optional*): where they are kept, also after the program, and shared by the
            processes of a computer; by default a temporary folder that is removed at the end.
        kwargs: the other arguments of `LeRobotDataset`, but for `decoded_cache`.

    Raises:
        InvalidConfigError: an impossible size of buffer or cache.
        Beside those of `LeRobotDataset`, which come up when a file is read.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        shuffle_buffer: int = 10_000,
        seed: int | None = None,
        cache_gb: float = 20.0,
        cache_folder: str | Path | None = None,
        **kwargs: Any,
    ):
        if not isinstance(shuffle_buffer, int) or shuffle_buffer < 0:
            raise InvalidConfigError(f"shuffle_buffer={shuffle_buffer!r} must be a number of samples, or 0.")
        if kwargs.get("decoded_cache") is not None:
            raise InvalidConfigError(
                "decoded_cache keeps every frame of a dataset; a stream is for datasets that are too large for that. "
                "Leave one of them out: decoded_cache=, or streaming (train: --data.streaming false)."
            )
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self._cache = FileCache(None if cache_folder is None else Path(cache_folder), cache_gb)
        self._share, self._endless = (0, 1), False
        self._epoch = _shared(0)  # seen by workers that are kept from pass to pass
        self._taken, self._skipped = 0, 0
        super().__init__(source, **kwargs)

    def _open_files(self, source: str | Path, downloaded: bool, rename_map: Mapping[str, str] | None) -> None:
        self._is_remote = downloaded
        old = {new: old for old, new in (rename_map or {}).items()}
        columns = [old.get(name, name) for name, feature in self._features.items() if feature["dtype"] != "video"]
        self._files = FilesOnDemand(source, self._metadata, downloaded, columns, self._cache)
        self._table = TableOnDemand(self._files, self._metadata, self._features, self._tolerance_s, rename_map)
        self._ready: tuple[int, int] | None = None  # the block that is being read
        self._coming: tuple[int, int] | None = None  # the one whose files are being fetched

    # --- which samples ---------------------------------------------------------------------------------------

    def split(self, rank: int, world_size: int) -> StreamingLeRobotDataset:
        """Return the stream of one of `world_size` processes."""
        total = self.num_samples
        if not 0 <= rank < world_size <= total:
            raise InvalidConfigError(
                f"split({rank}, {world_size}): the rank must be less than the number of processes, and those at most "
                f"the {total} samples."
            )
        return self._changed(_share=(rank, world_size))

    def repeat(self) -> StreamingLeRobotDataset:
        """Return the stream that begins the next pass where one ends, without end."""
        return self._changed(_endless=True)

    def seeded(self, seed: int) -> StreamingLeRobotDataset:
        """Return the stream in another order."""
        return self._changed(seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that is read next."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return where the stream is, in this process or DataLoader worker."""
        return {"epoch": int(self._epoch), "samples": self._taken, "seed": self.seed or 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on behind the samples that a stream of the same order, split and workers has returned."""
        if state["seed"] != (self.seed or 0):
            raise InvalidConfigError(
                f"The stream's seed is {self.seed or 0}, and that of the state is {state['seed']}: their samples come "
                f"in different orders."
            )
        self.set_epoch(state["epoch"])
        self._skipped = self._taken = state["samples"]

    @property
    def version_and_order(self) -> dict[str, Any]:
        """What decides which samples come when, beside episodes and features: for a training that goes on."""
        version = self.root.name if self._is_remote else fingerprint(sorted((self.root / "meta").rglob("*.*")))
        return {"version": version, "shuffle_buffer": self.shuffle_buffer, "stream_seed": self.seed}

    def random_access(self) -> Dataset:
        """Return the same samples by their positions in the dataset, for what is computed of a few or in order."""
        return _ByPosition(self)

    def _changed(self, **changes: Any) -> StreamingLeRobotDataset:
        other = copy.copy(self)
        other.__dict__.pop("_order", None)
        other.__dict__ |= {"_epoch": _shared(int(self._epoch)), **changes}
        return other

    @cached_property
    def _order(self) -> StreamOrder:
        kept = [self._metadata.videos[name] for name in self._features if name in self._metadata.videos]
        kinds = [self._metadata.data_paths, *(places.paths for places in kept)]
        files = [paths.file_of[self._episodes] for paths in kinds]
        return StreamOrder(np.diff(self._positions), files, self.shuffle_buffer, self.seed or 0, *self._share)

    # --- samples -----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own, self._skipped = self._skipped, 0
        self._taken = own
        turns, within = divmod(own, _TOGETHER)
        start = (turns * workers + number) * _TOGETHER  # of the samples that this worker reads next
        end = None if self._endless else len(self._order)
        first = int(self._epoch) * len(self._order)
        while end is None or start < end:
            stop = start + _TOGETHER if end is None else min(start + _TOGETHER, end)
            for sample in self.run(first + start + within, first + stop):
                self._taken += 1
                yield sample
            start, within = start + workers * _TOGETHER, 0

    def run(self, start: int, stop: int) -> list[dict]:
        """Return the samples start … stop - 1 of this share, counted from the beginning of pass 0 over all passes."""
        self._fetch_for(start)
        positions = self._order.positions(start, stop)
        samples = self.samples_at(positions) if len(positions) else []
        self._reader.close_removed()
        return samples

    def _fetch_for(self, start: int) -> None:
        """Fetch the files of the block that a sample is in, and then those of the next."""
        block = self._order.block_of(start)
        if block == self._ready:
            return
        if block != self._coming:
            self._prefetch(block)
        self._ready, self._coming = block, self._order.next_block(*block)
        self._prefetch(self._coming)

    def _prefetch(self, block: tuple[int, int]) -> None:
        positions = self._order.block(*block)
        episodes = self._episodes[np.unique(np.searchsorted(self._positions, positions, side="right") - 1)]
        kept = [self._metadata.videos[name] for name in self._features if name in self._metadata.videos]
        data = self._metadata.data_paths.of(episodes)
        self._files.prefetch(data, dict.fromkeys(places.paths[e] for places in kept for e in episodes))

    def _frames_of(self, camera: str, path: str, seconds: np.ndarray) -> torch.Tensor:
        frames = self._files.opened(
            self._files.video, path, lambda place: self._reader.frames(place, seconds, self._tolerance_s)
        )  # (n, 3, h, w)
        check_size(self._features, camera, self.root / path, frames.shape[-2:])
        return frames

    # --- what a stream does not have ---------------------------------------------------------------------------

    def __len__(self) -> int:
        raise StreamError(
            f"A stream has no length. num_frames ({self.num_frames}) counts its frames; a training counts steps: "
            f"max_steps=… (train: --training.max_steps). LeRobotDataset has a length and downloads all its files."
        )

    def __getitem__(self, index: Any) -> NoReturn:
        raise StreamError(
            "A stream is read from its beginning: `for sample in dataset`. LeRobotDataset returns a sample by its "
            "number and downloads all its files."
        )

    __getitems__ = __getitem__

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ready": None, "_coming": None}


def _shared(number: int) -> torch.Tensor:
    return torch.tensor(number).share_memory_()


class _ByPosition(Dataset):
    def __init__(self, stream: StreamingLeRobotDataset):
        self._stream = stream

    def __len__(self) -> int:
        return self._stream.num_samples

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return self._stream.samples_at(indices)
