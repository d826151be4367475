"""Columns of Arrow tables as arrays of numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ...errors import DatasetFormatError
from ..remedies import LEAVE_OUT_FEATURE

_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)


def as_numpy(name: str, array: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Return a column's rows as (rows, *shape), a view of Arrow's own memory where `is_view`.

    Raises:
        DatasetFormatError: the rows are not numbers of that shape.
    """
    return numbers_of(name, array, shape)[0]


def numbers_of(name: str, array: pa.Array, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a column's rows as (rows, *shape), and which hold nothing where a number cannot say so; None: all do.

    Nothing in place of a float is NaN.

    Raises:
        DatasetFormatError: the rows are not numbers of that shape.
    """
    try:
        values, empty = _dense(stored(array), shape)
        return values.reshape(len(array), *shape), empty
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        raise DatasetFormatError(
            f"The column {name!r} does not hold numbers of shape {shape} in every row, as meta/info.json says: "
            f"{error}. {LEAVE_OUT_FEATURE}."
        ) from error


def is_view(array: pa.Array) -> bool:
    """Tell whether a column's numbers are read where they are: nothing is absent, and each has bytes of its own."""
    array = stored(array)
    while _is_list(array.type):
        if array.null_count:
            return False
        array = stored(array.flatten())
    return not (array.null_count or pa.types.is_boolean(array.type))


def kind_of(kind: pa.DataType) -> str:
    """Return what a column of a type holds: `number`, `text`, `picture`, or its Arrow type."""
    kind = stored_type(kind)
    while _is_list(kind):
        kind = stored_type(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    if any(is_kind(kind) for is_kind in _TEXTS):
        return "text"
    return "picture" if any(is_kind(kind) for is_kind in _BYTES) else str(kind)


def stored(array: pa.Array) -> pa.Array:
    """Return an array without its extension type or dictionary."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of `stored` arrays."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _dense(array: pa.Array, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (rows, …) numbers, and which rows lack one that is no float; `shape` is that of rows without a length."""
    if not _is_list(array.type):
        return _plain(array)
    is_valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    given = array if is_valid is None else array.drop_null()
    width = _width(given, shape)
    inner, inner_empty = _dense(stored(given.flatten()), shape[1:])
    values = inner.reshape(len(given), width, *inner.shape[1:])
    empty = None if inner_empty is None else inner_empty.reshape(len(given), width).any(axis=1)
    if is_valid is None:
        return values, empty
    is_float = np.issubdtype(values.dtype, np.floating)
    every = np.full((len(array), *values.shape[1:]), np.nan if is_float else 0, values.dtype)
    every[is_valid] = values
    if is_float:
        return every, None
    lacking = ~is_valid
    lacking[is_valid] = False if empty is None else empty
    return every, lacking


def _plain(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise ValueError(f"they hold {array.type}")
    # Arrow packs eight booleans into a byte, and NumPy has NaN for nothing; every other number is mapped, not copied.
    if not array.null_count or pa.types.is_floating(array.type):
        return array.to_numpy(zero_copy_only=False), None
    empty = array.is_null().to_numpy(zero_copy_only=False)
    return array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False), empty


def _width(lists: pa.Array, shape: tuple[int, ...]) -> int:
    """Return how many values each of these lists has.

    Raises:
        ValueError: they differ; in sum they might fit.
    """
    if pa.types.is_fixed_size_list(lists.type):
        return lists.type.list_size
    if not len(lists):
        return shape[0] if shape else 1
    lengths = np.diff(lists.offsets.to_numpy())
    least, most = int(lengths.min()), int(lengths.max())
    if least != most:
        raise ValueError(f"lists of {least} to {most} are in it")
    return most


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
