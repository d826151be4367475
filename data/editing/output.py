"""The folder that a new dataset is written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..._files import new_folder, refuse_existing
from ...errors import OutputExistsError
from .source import Source


@contextmanager
def new_dataset(output: str | Path, sources: Sequence[Source], purpose: str) -> Iterator[Path]:
    """Yield the folder that becomes `output` when the block succeeds; nothing is left of it otherwise.

    Raises:
        OutputExistsError: it exists, or is or lies in one of the sources.
        FolderInUseError: another run writes it.
        DiskError: the disk does not take it.
    """
    output = Path(output).expanduser()
    for source in sources:
        if output.resolve() == source.root:
            raise OutputExistsError(output, "It is the source itself, which stays as it is.")
        if source.root in output.resolve().parents:
            raise OutputExistsError(source.root, f"{output} would lie inside of it, among its own files.")
    refuse_existing(output)
    with new_folder(output, purpose) as folder:
        yield folder
