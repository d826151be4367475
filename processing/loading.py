"""Load a processor from a checkpoint, whatever holds it: no code from a repository is run, and nothing is dropped."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils import PROCESSOR_NAME

from .._files import read_json
from .._tokenizers import load_tokenizer
from ..checkpoint import CONFIG_FILE, LOCATION, Checkpoint, find_folder, find_layout, listing, resolve
from ..configuration.strict import completed
from ..errors import CheckpointError, InvalidConfigError, MissingFileError, UnknownConfigFieldError

# What transformers passes along from its own doors.
_PASSED = ("_from_auto", "_from_pipeline", "code_revision", "return_unused_kwargs", "trust_remote_code", "use_fast")


def load_processor(processor_class: type, source: str | os.PathLike | Checkpoint, **kwargs: Any) -> Any:
    """Return the processor that a checkpoint holds; see `PolicyProcessor.from_pretrained`.

    Args:
        processor_class: the class to load, or for another project's checkpoint a base class of it.
        source: folder, Hub id or checkpoint.
        kwargs: where the checkpoint is, `tokenizer`, and fields to override; a mapping that is overridden in part
            keeps the rest of what is saved.

    Raises:
        MissingFileError, CorruptFileError: processor_config.json is absent, or holds no JSON mapping.
        UnknownConfigFieldError: an argument is none of these.
        InvalidConfigError: a tokenizer is given to a processor that has none.
    """
    location = {name: kwargs.pop(name) for name in LOCATION if name in kwargs}
    if kwargs.get("trust_remote_code"):
        raise CheckpointError("trust_remote_code=True is refused: no code from a repository is ever run.")
    kwargs = {name: value for name, value in kwargs.items() if name not in _PASSED}
    folder = source.folder if isinstance(source, Checkpoint) else find_folder(source, **location)[0]
    attributes = processor_class.get_attributes()
    tokenizer = kwargs.pop("tokenizer", None)
    layout = find_layout(read_json(folder / CONFIG_FILE)) if (folder / CONFIG_FILE).is_file() else None
    if layout is not None:  # its statistics may be among the weights, and its fields follow from their shapes
        checkpoint = resolve(source, **location)
        shared = layout.policy_class(checkpoint).config_class.field_names()
        own = {n: kwargs.pop(n) for n in list(kwargs) if n in processor_class.field_names() and n not in shared}
        processor = layout.read(checkpoint, loading={}, tokenizer=tokenizer, processor_fields=own, **kwargs)[1]
        if not isinstance(processor, processor_class):
            raise CheckpointError(
                f"{checkpoint.source} is read by a {type(processor).__name__}, not by a {processor_class.__name__}. "
                f"Use {type(processor).__name__}.from_pretrained, or PolicyPipeline.from_pretrained."
            )
        return processor
    if not (folder / PROCESSOR_NAME).is_file():
        raise MissingFileError(
            f"{getattr(source, 'source', source)} has no {PROCESSOR_NAME}, without which a policy's numbers mean "
            f"nothing; it holds {listing(folder)}. It is written by PolicyPipeline.save_pretrained, or by "
            f"processor.save_pretrained beside the policy's."
        )
    known = processor_class.field_names()
    for name in kwargs:
        if name not in known:
            raise UnknownConfigFieldError(processor_class.__name__, name, [*known, *attributes, *LOCATION])
    if tokenizer is not None and "tokenizer" not in attributes:
        raise InvalidConfigError(f"tokenizer= has no use: {processor_class.__name__} reads no instruction.")
    fields = completed(read_json(folder / PROCESSOR_NAME), kwargs)
    loaded = [load_tokenizer(folder if tokenizer is None else tokenizer) for _ in attributes]
    return processor_class.from_args_and_dict(loaded, fields)
