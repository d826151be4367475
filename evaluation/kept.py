"""The finished episodes of an evaluation, kept on the disk until all are finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .._files import partial_path, read_json, write_text
from ..errors import CorruptFileError, DifferentEvaluationError
from ..modeling.fingerprint import fingerprint
from .driver import Driver
from .episode import RolloutEpisode


class KeptRollouts:
    """Keep finished episodes in a record of the same form as the result, and take up those of an earlier run.

    Args:
        output: the file that the result will be in; None keeps nothing.
        settings: plain values that the outcome of an episode depends on.
        driver: counts the pipeline's calls and their time, which go on too.
        summarise: episodes → the plain values of a result.

    Raises:
        DifferentEvaluationError: episodes of other settings wait there.
        CorruptFileError: what waits there cannot be read.
    """

    def __init__(
        self,
        output: str | os.PathLike | None,
        settings: Mapping[str, Any],
        driver: Driver,
        summarise: Callable[[Sequence[RolloutEpisode]], dict[str, Any]],
    ):
        self.path = None if output is None else partial_path(output)
        self.episodes: dict[int, RolloutEpisode] = {}  # by seed
        self._settings = json.loads(json.dumps(settings, default=str))  # as they are read back
        self._driver, self._summarise = driver, summarise
        if self.path is not None and self.path.is_file():
            self._take_up()

    def keep(self, episodes: Iterable[RolloutEpisode]) -> None:
        """Write those of the episodes that are over and not there yet."""
        new = {episode.seed: episode for episode in episodes if episode.over and episode.seed not in self.episodes}
        if self.path is None or not new:
            return
        self.episodes |= new
        episodes = list(self.episodes.values())
        resume = {"settings": self._settings, "episodes": [asdict(episode) for episode in episodes]}
        resume |= {"seconds": self._driver.seconds, "calls": self._driver.calls}
        write_text(self.path, json.dumps(self._summarise(episodes) | {"resume": resume}, indent=2) + "\n")

    def forget(self, seeds: Iterable[int]) -> None:
        """Let the episodes of these seeds be run again."""
        for seed in seeds:
            self.episodes.pop(seed, None)

    def remove(self) -> None:
        """Remove the record."""
        self.episodes = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def note(self, requested: int) -> str:
        """Return a sentence on what is kept; empty for nothing."""
        if self.path is None or not self.path.is_file():
            return ""
        return (
            f"{len(self.episodes)} of {requested} episodes are finished and kept in {self.path}: the same evaluation "
            f"goes on after them."
        )

    def _take_up(self) -> None:
        resume = read_json(self.path).get("resume")
        try:
            found = resume["settings"]
            self.episodes = {row["seed"]: RolloutEpisode(**row) for row in resume["episodes"]}
            self._driver.seconds, self._driver.calls = float(resume["seconds"]), int(resume["calls"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(self.path, "record of an evaluation that goes on", repr(error)) from error
        others = [name for name in found.keys() | self._settings if found.get(name) != self._settings.get(name)]
        if others:
            different = {name: (found.get(name), self._settings.get(name)) for name in sorted(others)}
            raise DifferentEvaluationError(self.path, len(self.episodes), different)


def policy_digest(pipeline: Any) -> str | None:
    """Return a digest of a pipeline's policy and processor; None for any other callable."""
    policy, processor = getattr(pipeline, "policy", None), getattr(pipeline, "processor", None)
    if not isinstance(policy, torch.nn.Module) or not hasattr(processor, "to_dict"):
        return None
    content = json.dumps([fingerprint(policy), processor.to_dict()], default=str, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
