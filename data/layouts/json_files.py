"""Read the JSON files of `meta/`, each with an error that names the file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import DatasetFormatError, DatasetNotFoundError
from .metadata import Statistics

STATISTICS_PATH = "meta/stats.json"


def load_statistics_file(root: Path) -> Statistics:
    """Read `meta/stats.json`; cameras have shape (c, 1, 1) in [0, 1].

    Raises:
        DatasetFormatError: it is absent or cannot be read.
    """
    with naming_the_remedy(root):
        return as_statistics(read_json(root, STATISTICS_PATH), root / STATISTICS_PATH)


@contextmanager
def naming_the_remedy(root: Path) -> Iterator[None]:
    """Say of every error in reading statistics how they are computed anew: no download mends them."""
    try:
        yield
    except DatasetNotFoundError as error:
        raise DatasetFormatError(f"{root} has no statistics of its features. {recompute(root)}") from error
    except DatasetFormatError as error:
        reason = str(error).removesuffix(" Download or write it again.")
        raise DatasetFormatError(f"{reason} {recompute(root)}") from error


def recompute(root: Path) -> str:
    """Return the line that heals statistics which are absent or damaged."""
    return f"Compute the statistics anew: manipulators convert-dataset {shlex.quote(str(root))} <new folder>"


def as_statistics(plain: Mapping, where: object) -> Statistics:
    """Return statistics read as JSON from `where` as float32 arrays."""
    try:
        return {
            feature: {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}
            for feature, values in plain.items()
        }
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise DatasetFormatError(
            f"{where} must map each feature to its statistics, lists of numbers: {error}. Download or write it again."
        ) from error


def read_json(root: Path, name: str) -> dict:
    """Read a file that holds one JSON object."""
    text = _text(root, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetFormatError(f"{root / name} is not valid JSON: {error}. Download or write it again.") from error
    if not isinstance(value, dict):
        raise DatasetFormatError(f"{root / name} must hold a JSON object; got {type(value).__name__}.")
    return value


def read_json_lines(root: Path, name: str, keys: Mapping[str, type]) -> Iterator[tuple]:
    """Yield the values under `keys`, which have these types, of a file with one JSON object per line."""
    for number, line in enumerate(_lines(root, name), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wrong = [key for key, kind in keys.items() if type(row[key]) is not kind]
            problem = f"its {', '.join(wrong)} has another type than expected" if wrong else None
        except (ValueError, RecursionError) as error:
            problem = f"it is not valid JSON ({error})"
        except (KeyError, TypeError):
            problem = f"it must be an object with {', '.join(keys)}"
        if problem:
            raise DatasetFormatError(f"Line {number} of {root / name}: {problem}. Download or write it again.")
        yield tuple(row[key] for key in keys)


def incomplete(root: Path, name: str) -> DatasetNotFoundError:
    """Return the error for a dataset without the file `name`."""
    return DatasetNotFoundError(
        f"{root} is not a complete LeRobot dataset: it has no {name}. Give the folder that contains "
        f"meta/, data/ and videos/, or download it again."
    )


def _lines(root: Path, name: str) -> Iterator[str]:
    """Yield the lines of a file, of which the whole may be too much for memory; only a line feed ends one."""
    with _naming_the_file(root, name), (root / name).open(encoding="utf-8", newline="\n") as file:
        yield from file


def _text(root: Path, name: str) -> str:
    with _naming_the_file(root, name):
        return (root / name).read_text(encoding="utf-8")


@contextmanager
def _naming_the_file(root: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise incomplete(root, name) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetFormatError(f"{root / name} cannot be read: {error}. Download or write it again.") from error
