"""Strict loading: every reading of the weights in a folder, and what a policy's weights must be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .._files import read_json
from ..checkpoint import ADAPTER_FILES, ADAPTER_WEIGHTS, RECORDS, listing, refuse_code
from ..errors import (
    CheckpointError,
    ConflictingWeightsError,
    CorruptFileError,
    InvalidConfigError,
    ManipulatorsError,
    MissingFileError,
    UnknownConfigFieldError,
    WeightsMismatchError,
    WeightsValueError,
)
from .loading_arguments import allowed_arguments
from .quantization import limited_to_declared, missing_library, quantized_names, settle
from .sharding import local

logger = logging.get_logger(__name__)

# Types of weights as safetensors names them, and as torch does.
_WEIGHT_TYPES = frozenset(
    ("F64", "F32", "BF16", "F16", *(torch.float64, torch.float32, torch.bfloat16, torch.float16))
)
_SHARD = re.compile(r"model(?:\.[\w-]+)?-\d{5}-of-\d{5}(?:\.[\w-]+)?\.safetensors")


# --- files ------------------------------------------------------------------------------------------------


def weight_files(folder: Path, variant: str | None = None, source: str | None = None) -> list[Path]:
    """Return the weight files of a folder: the only one, or every shard that the index names.

    Args:
        folder: of the checkpoint.
        variant: such as `fp16` for model.fp16.safetensors.
        source: what the caller asked for, for messages; by default the folder.

    Raises:
        MissingFileError: there is none, or a shard is absent.
        ConflictingWeightsError: there are two sets of weights.
        CorruptFileError: the index cannot be read.
    """
    single, index = folder / _variant(SAFE_WEIGHTS_NAME, variant), folder / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    adapter = [folder / name for name in ADAPTER_FILES[:2] if (folder / name).is_file()]
    held = [path for path in (single, index, *adapter[:1]) if path.is_file()]
    if len(held) > 1:
        raise ConflictingWeightsError(source or folder, [path.name for path in held])
    if adapter:
        return [folder / ADAPTER_WEIGHTS]
    if single.is_file():
        return [single]
    if not index.is_file():
        raise MissingFileError(
            f"{source or folder} holds no {single.name}; it holds {listing(folder)}. "
            f"Pickled weights are never read; write safetensors with save_pretrained."
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CorruptFileError(index, "index of weights", "it has no weight_map")
    names = sorted(set(map(str, shards.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise CorruptFileError(index, "index of weights", f"{outside[0]!r} is no file beside it")
    files = [folder / name for name in names]
    if missing := [path.name for path in files if not path.is_file()]:
        raise MissingFileError(f"{folder} lacks {', '.join(missing)}, which {index.name} names. Download it again.")
    return files


def remove_other_weights(folder: Path, *, adapter: bool, variant: str | None = None) -> None:
    """Remove the sets of weights that a folder held before an adapter, or a whole policy, was saved into it.

    A whole policy that was saved in shards has written an index, which `discard_index` had removed before.
    """
    index = folder / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if adapter:
        old = [path for path in folder.iterdir() if path.name == SAFE_WEIGHTS_NAME or _SHARD.fullmatch(path.name)]
        old.append(index)
    else:
        old = [folder / name for name in ADAPTER_FILES]
        old += [folder / _variant(SAFE_WEIGHTS_NAME, variant)] if index.is_file() else []
    for path in old:
        path.unlink(missing_ok=True)


@contextmanager
def removing_stale_records(folder: Path, written: Collection[str] = ()) -> Iterator[None]:
    """Remove the records in a folder where the block replaces its weights by others: they are of another policy.

    Args:
        folder: may be absent.
        written: names of records that the block writes.
    """
    records = [folder / name for name in RECORDS if name not in written]
    before = _digest(folder) if any(path.is_file() for path in records) else None
    yield
    if before is not None and _digest(folder) != before:
        stale = [path for path in records if path.is_file()]
        for path in stale:
            path.unlink()
        if stale:
            names = ", ".join(path.name for path in stale)
            logger.warning(f"{folder} now holds other weights than those of {names}, which is removed.")


def _digest(folder: Path) -> str | None:
    """Return what tells the tensors in a folder from others, however they are split; None where there are none."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted([*folder.glob("model*.safetensors"), *folder.glob(ADAPTER_WEIGHTS)]):
        tensors |= read_tensors(path, backend="mmap")
    digest = hashlib.blake2b()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if tensors else None


def discard_index(folder: Path, variant: str | None = None) -> None:
    """Remove the index of shards that are about to be replaced."""
    (folder / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)).unlink(missing_ok=True)


def _variant(name: str, variant: str | None) -> str:
    """Return `model.fp16.safetensors` for `model.safetensors` and the variant `fp16`."""
    if not variant:
        return name
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"


# --- tensors ----------------------------------------------------------------------------------------------


def read_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in some safetensors files, from their headers.

    Raises:
        CorruptFileError: one cannot be read.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(path, "safetensors file", error) from error
    return found


def read_types(paths: Iterable[Path]) -> dict[str, str]:
    """Return the type of every tensor in some safetensors files, such as `F32`, from their headers.

    Raises:
        CorruptFileError: one cannot be read.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(path, "safetensors file", error) from error
    return found


def read_tensors(path: Path, backend: str = "pread") -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; with `backend="mmap"` they stay on disk until they are used.

    Raises:
        MissingFileError, CorruptFileError: it is absent, or not safetensors.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path.parent} holds no {path.name}; it holds {listing(path.parent)}. Pickled weights are never read."
        )
    try:
        return load_file(path, backend=backend)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(path, "safetensors file", error) from error


def read_weights(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's weight files, which stay on disk until `load_weights` has placed them."""
    return _read_all(weight_files(folder, variant))


def _read_all(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= read_tensors(path, backend="mmap")
    return tensors


def require_same_tensors(source: object, found: Mapping[str, tuple], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes of saved tensors with those that are to receive them.

    Raises:
        WeightsMismatchError: some are missing, unexpected or of another shape.
    """
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    missing, unexpected = shapes.keys() - found.keys(), found.keys() - shapes.keys()
    mismatched = [(n, s, shapes[n]) for n, s in found.items() if n in shapes and s != shapes[n]]
    if missing or unexpected or mismatched:
        raise WeightsMismatchError(str(source), missing, unexpected, mismatched)


def require_weight_types(source: object, found: Mapping[str, object], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that saved weights are of a type with fractions: casting integers to float hides that they are others.

    Args:
        source: for messages.
        found: name → type, as safetensors or torch calls it.
        expected: the tensors that are to receive them; those that hold integers themselves may.

    Raises:
        WeightsValueError: some are integers, truth values or of 8 bits.
    """
    wrong = [(n, t) for n, t in found.items() if t not in _WEIGHT_TYPES and n in expected]
    wrong = [(name, kind) for name, kind in wrong if expected[name].is_floating_point()]
    if wrong:
        raise WeightsValueError(source, of_type=wrong)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that are NaN or infinite.

    The smallest and the largest value tell: each tensor is read once, and nothing of its size is allocated. It takes
    0.1 to 0.3 s for each GB on one CPU core. The results of a device are waited for once.
    """
    flags: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        value = local(value)  # each process looks at its own
        is_plain = type(value) is torch.Tensor and value.dtype in _WEIGHT_TYPES  # others are quantised on purpose
        if is_plain and value.numel() and not value.is_meta:
            flags.setdefault(value.device, {})[name] = torch.stack(value.aminmax()).isfinite().all()
    bad: list[str] = []
    for of_device in flags.values():
        finite = torch.stack(list(of_device.values())).tolist()
        bad += [name for name, is_finite in zip(of_device, finite, strict=True) if not is_finite]
    return bad


def require_finite(source: object, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that no weight is NaN or infinite; see `not_finite`.

    Raises:
        WeightsValueError: some are.
    """
    if bad := not_finite(tensors):
        raise WeightsValueError(source, not_finite=bad)


# --- policies ---------------------------------------------------------------------------------------------


def load_weights(
    policy_class: type[PreTrainedModel],
    folder: Path | None,
    config: PreTrainedConfig,
    *args: Any,
    source: str,
    allow_partial: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Build a policy and fill it with the weights of a folder, or with `state_dict=`; every tensor must fit.

    Args:
        policy_class: of the policy.
        folder: holds the weights under the policy's own names; None with `state_dict=`.
        config: the policy's.
        args: further arguments of the policy's constructor.
        source: what the caller asked for, for messages; the policy's config records it.
        allow_partial: accept missing, unexpected and mis-shaped weights, and log them.
        output_loading_info: return transformers' record of what did not fit, too.
        kwargs: what `PreTrainedModel.from_pretrained` takes.

    Returns:
        The policy, in eval mode; its weights are in memory of their own, whatever happens to the files.

    Raises:
        WeightsMismatchError: weights are missing, unexpected or of another shape.
        WeightsValueError: some are NaN, infinite, or no floating-point numbers.
        MissingFileError, CorruptFileError, ConflictingWeightsError: there is no readable single set of weights.
    """
    kwargs = allowed_arguments(kwargs)
    refuse_code(config.to_dict() | {"attn_implementation": getattr(config, "_attn_implementation", None)}, source)
    if getattr(config, "transformers_weights", None) is not None:
        raise CheckpointError(f"transformers_weights={config.transformers_weights!r} is refused: leave it out.")
    files = [] if folder is None else weight_files(folder, kwargs.get("variant"), source)
    were_quantised = getattr(config, "quantization_config", None) is not None
    if kwargs.get("quantization_config") is not None and not were_quantised:
        chosen = kwargs["quantization_config"]
        kwargs["quantization_config"] = limited_to_declared(chosen, policy_class, config, *args)
    try:
        with _without_load_report() as reports:
            policy, info = PreTrainedModel.from_pretrained.__func__(
                policy_class,
                None if folder is None else str(folder),
                *args,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
    except SafetensorError as error:
        raise CorruptFileError(source, "safetensors checkpoint", error) from error
    except OSError as error:
        if isinstance(error, ManipulatorsError):
            raise
        raise MissingFileError(f"The weights of {source} cannot be read: {error}") from error
    except RuntimeError as error:
        if not reports or "conversion" not in str(error):
            raise
        reason = "; ".join(dict.fromkeys(re.findall(r"^(\w+Error: .*)$", reports[0], re.MULTILINE)))
        raise CheckpointError(f"The weights of {source} cannot be quantised: {reason or reports[0]}") from error
    except ImportError as error:
        quantization = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        if isinstance(error, ManipulatorsError) or quantization is None:
            raise
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method")
        raise missing_library(method, error) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ManipulatorsError):
            raise
        unknown = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown:  # what is no argument of loading reaches the constructor
            names = policy_class.config_class.field_names()
            raise UnknownConfigFieldError(policy_class.config_class.__name__, unknown[1], names) from error
        raise InvalidConfigError(  # by a part that transformers builds, or by accelerate
            f"{policy_class.__name__} cannot be built and loaded from {source} with its config and these arguments: "
            f"{type(error).__name__}: {error}"
        ) from error
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        mismatch = WeightsMismatchError(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        if not allow_partial:
            raise mismatch
        logger.warning(f"allow_partial=True: {mismatch}")
    given, quantised = kwargs.get("state_dict"), quantized_names(policy)
    if not were_quantised:
        if kwargs.get("quantization_config") is not None and not quantised:
            method = type(kwargs["quantization_config"]).__name__
            raise InvalidConfigError(
                f"{method} has quantised no layer of {source}: their widths do not suit it. Choose another method or "
                f"group size, or leave quantization_config out."
            )
        types = read_types(files) if given is None else {name: value.dtype for name, value in given.items()}
        floats = dict.fromkeys(quantised, torch.empty(0))
        require_weight_types(source, types, policy.state_dict() | floats)
    own_memory(policy)
    require_finite(source, dict(_tensors(policy)))
    if quantised:
        before = dict(policy.named_parameters()) if were_quantised else given or _read_all(files)
        before = {name: before[name] for name in quantised if name in before}
        require_finite(source, before)
        settle(policy, before)
    policy.config.name_or_path = policy.name_or_path = source
    policy.freeze_parts()
    return (policy, info) if output_loading_info else policy


def own_memory(module: torch.nn.Module) -> None:
    """Copy tensors on the CPU, so that they are no longer the mapped file, which another process may overwrite.

    It takes about 0.5 s for each GB, and as much memory as the weights have.
    """
    for _, tensor in _tensors(module):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def _without_load_report() -> Iterator[list[str]]:
    """Collect transformers' table of what did not fit, not log it: here it becomes an error or one warning."""
    report = logging.get_logger("transformers.modeling_utils")
    found: list[str] = []

    level, own = report.getEffectiveLevel(), report.level

    def is_other(record: Any) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return record.levelno >= level
        found.append(record.getMessage())
        return False

    report.addFilter(is_other)
    if level > logging.WARNING:  # the table is read at any verbosity; at WARNING itself, transformers says more
        report.setLevel(logging.WARNING - 1)
    try:
        yield found
    finally:
        report.removeFilter(is_other)
        report.setLevel(own)
