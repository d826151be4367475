"""Write files and folders that appear complete or not at all, and read JSON files with a named error."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._disk import naming_disk_errors
from ._lock import locked
from .errors import CorruptFileError, OutputExistsError


@contextmanager
def new_folder(path: str | os.PathLike, purpose: str = "another run", replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path` that is renamed to it when the block succeeds, and removed otherwise.

    Args:
        path: the folder to make; it is locked meanwhile.
        purpose: what for, as a second run is told.
        replace: whether it takes the place of the folder that is there.

    Raises:
        OutputExistsError: `path` exists and is not an empty folder, unless it is replaced.
        FolderInUseError: another run is making it.
        DiskError: the disk does not take what is written.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path)
    with naming_disk_errors(path), locked(path, purpose):
        beside = path.with_name(path.name + ".incomplete")
        shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed
        beside.mkdir(parents=True)
        try:
            yield beside
            if path.is_dir() and not replace:
                path.rmdir()  # empty, as checked above
            replace_folder(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def replace_folder(finished: str | os.PathLike, path: str | os.PathLike) -> None:
    """Rename a finished folder to `path`, replacing what is there; after a power cut one of both is complete."""
    finished, path = Path(finished), Path(path)
    for written in (*finished.rglob("*"), finished):
        _flush(written)
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(finished, path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def refuse_existing(path: str | os.PathLike) -> None:
    """Raise `OutputExistsError` unless `path` is free, or an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputExistsError(path)


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it is renamed to it when the block succeeds, and removed otherwise.

    Raises:
        DiskError: the disk does not take what is written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.incomplete{path.suffix}")  # libraries know a format by its suffix
    with naming_disk_errors(path):
        try:
            yield beside
            _flush(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def read_json(path: str | os.PathLike) -> dict:
    """Return the mapping that a JSON file holds.

    Raises:
        CorruptFileError: it is not JSON, or does not hold a mapping.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(path, "JSON file", error) from error
    if not isinstance(content, dict):
        raise CorruptFileError(path, "JSON mapping", f"it holds {type(content).__name__}")
    return content


def partial_path(output: str | os.PathLike) -> Path:
    """Return where what is finished waits until `output` can be written whole."""
    output = Path(output)
    return output.with_name(f"{output.stem}.partial{output.suffix}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, completely or not at all."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replace_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose files move into `folder`, one rename each, when the block succeeds.

    Raises:
        DiskError: the disk does not take what is written.
    """
    folder = Path(folder)
    with naming_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / ".incomplete"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            for path in sorted(beside.iterdir()):
                _flush(path)
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a later rename cannot reach it first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
