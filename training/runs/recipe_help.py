"""What a recipe can set: every section's fields with type, value and meaning, as text."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, field, fields
from enum import Enum
from typing import Any, get_type_hints

from transformers import TrainingArguments

from ...configuration.typed_values import type_words
from ...modeling import registry
from ..arguments import PolicyTrainingArguments
from .recipe import Recipe, is_list, section_of

WIDTH = 110
_NOT_SET = ("input_features", "output_features", "format_version")  # those of the dataset, and of the library
_SECTION_FIELDS = ("config", "training")  # whose fields are those of other classes
_ENTRY = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*)(?: \([^)]*\)+(?:, [^:]*)?)?: (.*)")


def recipe_help(recipe: Recipe | None = None) -> str:
    """Return every field that a recipe has; of a given one also its values, and the fields of its policy's config."""
    lines = ["Every field, as --section.field value:", *_section(Recipe, recipe, "")]
    if recipe is None:
        lines += ["", "The fields of config are those of the policy: manipulators train RECIPE --help"]
    else:
        config_class = registry.policy_class(recipe.policy).config_class
        types = {name: kind for name, kind in config_class.field_types().items() if name not in _NOT_SET}
        declared = {name: config_class.__dataclass_fields__.get(name, field()) for name in types}
        lines += ["", f"config: of {recipe.policy}"]
        lines += _fields(declared, types, documented(config_class), recipe.config)
    declared = {f.name: f for f in fields(PolicyTrainingArguments) if f.init and f.name != "output_dir"}
    help_of = {name: _help(name) for name in declared}
    lines += ["", "training: what transformers.TrainingArguments has, and more"]
    given = {} if recipe is None else recipe.training
    lines += _fields(declared, get_type_hints(PolicyTrainingArguments), help_of, given, "training")
    return "\n".join(lines)


def documented(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each argument: `name (type): meaning`."""
    meanings: dict[str, str] = {}
    for base in cls.__mro__:
        text = textwrap.dedent((vars(base).get("__doc__") or "").partition("Args:\n")[2])
        block = re.split(r"\n\S", text, maxsplit=1)[0] if text.startswith(" ") else text.partition("\n\n")[0]
        for entry in re.split(r"\n(?! )", textwrap.dedent(block)):
            match = _ENTRY.match(" ".join(entry.split()))
            for name in match[1].split(", ") if match else ():
                meanings.setdefault(name, match[2])
    return meanings


def _section(cls: type, values: Any, prefix: str) -> Iterator[str]:
    """Yield the lines of a section and of the sections in it."""
    hints, meanings = get_type_hints(cls), documented(cls)
    declared = {f.name: f for f in fields(cls) if f.name not in (*_SECTION_FIELDS, "name")}
    plain = {name: f for name, f in declared.items() if section_of(hints[name]) is None}
    given = {name: getattr(values, name) for name in plain} if values is not None else {}
    yield from _fields(plain, hints, meanings, given, prefix)
    for name in [name for name in declared if name not in plain]:
        inner, path = getattr(values, name, None), f"{prefix}.{name}".lstrip(".")
        yield from ("", f"{path}: {meanings.get(name, '')}")
        if is_list(hints[name]):  # its entries have numbers; the first stands for all
            inner, path = (inner or [None])[0], f"{path}.0"
        yield from _section(section_of(hints[name]), inner, path)


def _fields(
    declared: Mapping[str, Field],
    hints: Mapping[str, Any],
    meanings: Mapping[str, str],
    given: Mapping[str, Any],
    prefix: str = "config",
) -> Iterator[str]:
    """Yield two lines or more per field: `--section.field type = value`, and what it means."""
    for name, f in declared.items():
        value = given.get(name, _default(f))
        shown = "" if value is MISSING else f" = {_shown(value)}"
        yield f"  --{f'{prefix}.{name}'.lstrip('.')}  {type_words(hints[name])}{shown}"
        yield from textwrap.wrap(meanings.get(name, ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(f: Field) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    value = value.value if isinstance(value, Enum) else value
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _help(name: str) -> str:
    """Return what the help of a training argument says first; one that is declared again has that of transformers."""
    fields_of = [cls.__dataclass_fields__ for cls in (PolicyTrainingArguments, TrainingArguments)]
    texts = [declared[name].metadata.get("help") for declared in fields_of if name in declared]
    text = " ".join(next(filter(None, texts), "").split())
    sentences = re.split(r"(?<=[a-z)`]\.) (?=[A-Z])", text)
    return " ".join(sentences[: 1 if len(sentences[0]) > 60 else 2])
