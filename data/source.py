"""Find a dataset in a local folder or on the Hub, from which only the needed files are downloaded."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError

from ..errors import DatasetNotFoundError, RecordingError
from .layouts.metadata import DatasetMetadata
from .recording.place import count_kept_episodes, recording_folder

logger = logging.getLogger(__name__)

_WAITS = (1, 4, 16)  # before a download is tried again [s]
_HUB_URL = "hf://datasets/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def fetch_metadata(source: str | Path, revision: str | None = None) -> tuple[Path, bool]:
    """Return the folder of `source` with at least `meta/` in it, and whether it is a snapshot of the Hub.

    Raises:
        DatasetNotFoundError: `source` is neither a folder nor a repository that can be reached or is cached.
        RecordingError: its recording has not been finished.
    """
    source, revision = _plain(source, revision)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve(), False
    if count := count_kept_episodes(folder):
        raise RecordingError(
            f"The recording of {source} is not finished: {count} episodes wait in {recording_folder(folder)}. Go on "
            f"with the same command, or make the dataset of them: LeRobotWriter(…) as it was made, and close()."
        )
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        raise DatasetNotFoundError(
            f"There is no folder {str(source)!r}. Give a folder with meta/, data/ and videos/, or a Hub "
            f'id such as "lerobot/pusht".'
        )
    return _download(source, revision, ["meta/**"]), True


def fetch_files(source: str, metadata: DatasetMetadata, paths: Iterable[str]) -> None:
    """Download `paths` of the same commit as the snapshot folder of `metadata`, except those it has already."""
    source, _ = _plain(source)
    wanted = set(paths)
    if all((metadata.root / path).is_file() for path in wanted):
        return
    # The Hub's client compares every file with every pattern: thousands of episodes need whole folders instead.
    folders: dict[str, set[str]] = {}
    for path in metadata.files:
        folders.setdefault(path.rpartition("/")[0], set()).add(path)
    patterns = []
    for folder, files in folders.items():
        patterns += [f"{folder}/*"] if len(files) > 1 and files <= wanted else sorted(files & wanted)
    _download(source, metadata.root.name, patterns)  # a snapshot folder bears the name of its commit


def download_file(source: str, commit: str, path: str, target: Path) -> None:
    """Download one file of a repository to `target`; a network that fails is tried again.

    Raises:
        DatasetNotFoundError: it cannot be downloaded.
    """
    source, _ = _plain(source)
    folder = target.with_name(f"{target.name}.download")
    try:
        for wait in (*_WAITS, None):
            try:
                with _naming_the_hub(source, None):
                    found = hf_hub_download(source, path, repo_type="dataset", revision=commit, local_dir=folder)
                Path(found).replace(target)
                return
            except DatasetNotFoundError as error:
                if wait is None or not _may_pass(error.__cause__):
                    raise
                logger.warning("%s of %s is downloaded again in %d s: %s", path, source, wait, error.__cause__)
                time.sleep(wait)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plain(source: str | Path, revision: str | None = None) -> tuple[str | Path, str | None]:
    """Return id and revision of a repository that is named as fsspec does, `hf://datasets/org/name@revision`."""
    if not isinstance(source, str) or not source.startswith(_HUB_URL):
        return source, revision
    name, _, named = source.removeprefix(_HUB_URL).rstrip("/").partition("@")
    return name, revision or named or None


def _may_pass(error: BaseException | None) -> bool:
    """Tell whether a download that failed may succeed later: nobody answered, or the Hub itself failed."""
    if isinstance(error, HFValidationError) or constants.HF_HUB_OFFLINE:
        return False
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
        return False  # the disk here
    response = getattr(error, "response", None)
    return response is None or response.status_code == 429 or response.status_code >= 500


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    with _naming_the_hub(source, revision):
        return Path(snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=patterns))


@contextmanager
def _naming_the_hub(source: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, (OSError, HFValidationError)) or type(error).__module__.startswith("httpx")):
            raise
        raise DatasetNotFoundError(
            f"{source!r} is neither a local folder nor a dataset that can be read from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {error} Check the spelling, log in with "
            f"`hf auth login` if it is private, and without a network use a dataset that is cached already."
        ) from error
