"""Where a recording keeps its finished episodes; light enough for a command that was interrupted."""

from __future__ import annotations

import os
from pathlib import Path

EPISODE_FOLDER, EPISODE_FILE = "episode-{:06d}", "episode.json"
EPISODE_PATTERN = f"episode-*/{EPISODE_FILE}"


def recording_folder(root: str | os.PathLike) -> Path:
    """Return the folder beside the dataset `root` in which its episodes wait until it is made."""
    root = Path(root)
    return root.with_name(root.name + ".recording")


def count_kept_episodes(root: str | os.PathLike) -> int:
    """Return how many finished episodes wait for the recording of `root` to go on."""
    return len(list(recording_folder(root).glob(EPISODE_PATTERN)))
