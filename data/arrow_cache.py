"""The memory-mapped Arrow copy of parquet files, in the cache of 🤗 datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet, ParquetConfig

from .._disk import naming_disk_errors
from ..errors import DatasetFormatError, DiskError
from .fingerprint import fingerprint


@dataclasses.dataclass
class _ConfigByContent(ParquetConfig):
    """Name the copy after what the files hold; 🤗 datasets names it after their paths and times."""

    content: str = ""

    def create_config_id(self, *args: object, **kwargs: object) -> str:
        return f"content-{self.content}"


class _Copy(Parquet):
    BUILDER_CONFIG_CLASS = _ConfigByContent


def memory_mapped(paths: Sequence[Path]) -> datasets.Dataset:
    """Return the rows of parquet files as one table, through an Arrow copy that is made once.

    Raises:
        DatasetFormatError: a file cannot be read.
        ReadOnlyError, DiskFullError: the copy cannot be written.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        with naming_disk_errors(cache, remedy="another folder: HF_DATASETS_CACHE=<folder> in the environment"):
            # Given as resolved files: a pattern would be looked for, and a name with brackets is none.
            files = datasets.data_files.DataFilesList([str(path) for path in paths], [("",)] * len(paths))
            builder = _Copy(
                cache_dir=str(cache),
                dataset_name="manipulators",
                data_files=datasets.data_files.DataFilesDict({"train": files}),
                content=fingerprint(paths),
            )
            if not Path(builder.cache_dir).is_dir():
                builder.info.features = _common_features(paths)
                builder.download_and_prepare()
            return builder.as_dataset(split="train")
    except DiskError:
        raise
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise DatasetFormatError(_unreadable(paths, error.__cause__ or error)) from error
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _common_features(paths: Sequence[Path]) -> datasets.Features:
    """Return the columns of all files: of one whose type differs from file to file, the type that holds all."""
    schemas = [pq.read_schema(path) for path in paths]
    types: dict[str, dict[pa.DataType, pa.Schema]] = {}  # column → its types, each with the first schema that has it
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, {}).setdefault(field.type, schema)
    features = datasets.Features()
    for name, found in types.items():
        features[name] = datasets.Features.from_arrow_schema(next(iter(found.values())))[name]
        if len(found) > 1:
            try:
                fields = [pa.schema([pa.field(name, kind)]) for kind in found]
                common = pa.unify_schemas(fields, promote_options="permissive")
                features[name] = datasets.Features.from_arrow_schema(common)[name]
            except pa.ArrowException:
                continue  # such as lists with and without a length: the files are cast to the first one's
    return features


def _unreadable(paths: Sequence[Path], reason: object) -> str:
    """Return a message that names the unreadable data file, where a single one causes the error."""
    for path in paths:
        try:
            for _ in pq.ParquetFile(path).iter_batches():
                pass
        except (pa.ArrowException, OSError, ValueError) as error:
            return f"{path} cannot be read as a parquet file: {error}. Download or write it again."
    return (
        f"The data files beside {paths[0]} cannot be read together: {reason}. Their columns may differ from file to "
        f"file; download or write the dataset again."
    )
