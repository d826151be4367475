"""Paths of data and video files: templates of `meta/info.json`, filled in, and never outside the dataset."""

from __future__ import annotations

import re
import string
from pathlib import PurePosixPath

from ...errors import DatasetFormatError
from .metadata import INFO_PATH

_NUMBER_FORMAT = re.compile(r"0?\d{0,2}d?")  # such as 03d
_NO_FORMAT = re.compile("")
_LONGEST_NAME = 255  # bytes of a file's or folder's name


class PathTemplate:
    """Fill in `data_path` or `video_path`.

    A link in the dataset's folder is followed, because its owner has set it: the Hub's cache consists of links. The
    text of a template is somebody else's, so what it names lies inside the folder.

    Args:
        template: such as `"data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"`.
        key: its name in `meta/info.json`, for messages.
        fields: the names that may stand in braces; those but `video_key` are numbers.

    Raises:
        DatasetFormatError: it is no text, or something else stands in braces.
    """

    def __init__(self, template: object, key: str, fields: tuple[str, ...]):
        self._template, self._key = template, key
        try:
            parts = list(string.Formatter().parse(template))
        except (TypeError, ValueError) as error:
            raise self._refused(f"it is no path with names in braces: {error}", fields) from error
        for _, field, spec, conversion in parts:
            if field is None:
                continue
            form = _NO_FORMAT if field == "video_key" else _NUMBER_FORMAT
            if field not in fields or conversion or not form.fullmatch(spec):
                raise self._refused(f"{{{field}}} cannot be filled in", fields)
        self._fields = fields

    def fill(self, **values: int | str) -> str:
        """Return the path of one file, relative to the dataset's folder.

        Raises:
            DatasetFormatError: it lies outside.
        """
        path = self.filled(**values)
        if not is_inside(path):
            camera = f" of the camera {values['video_key']!r}" if "video_key" in values else ""
            raise DatasetFormatError(
                f"{INFO_PATH} has the {self._key} {self._template!r}: the file{camera} would be {path[:200]!r}, "
                f"outside the dataset's folder. Correct it, or download the dataset from somebody you trust."
            )
        return path

    def filled(self, **values: int | str) -> str:
        """Return the path of a file that is known to be inside: `fill` has taken one with longer numbers."""
        return self._template.format(**values)

    def _refused(self, problem: str, fields: tuple[str, ...]) -> DatasetFormatError:
        known = ", ".join(f"{{{name}}}" for name in fields)
        return DatasetFormatError(
            f"{INFO_PATH} has the {self._key} {str(self._template)[:200]!r}, in which {problem}. Known: {known}, "
            f"numbers also as in {{{fields[0]}:03d}}. Correct it, or remove it for the usual path."
        )


def is_inside(path: str) -> bool:
    """Tell whether a relative path stays in the folder that it starts from, on every operating system."""
    parts = PurePosixPath(path).parts
    return (
        not PurePosixPath(path).is_absolute()
        and ".." not in parts
        and not any(mark in path for mark in "\\\0")
        and ":" not in (parts[0] if parts else ":")
        and all(len(part.encode(errors="surrogatepass")) <= _LONGEST_NAME for part in parts)
    )
