"""Turn what JSON, YAML and the command line can say into what a typed field holds."""

import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from huggingface_hub.dataclasses import type_validator

from ..errors import InvalidConfigError, nearest
from .features import PolicyFeature


class _Loader(yaml.SafeLoader):
    """Read 1e-6 as the number it is in JSON and YAML 1.2; to PyYAML it is text without a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Return what YAML says, in plain values.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _Loader)


def to_field_type(value: Any, annotation: Any) -> Any:
    """Convert `value` losslessly to `annotation`: JSON lists to tuples, int to float, names to enum members.

    What does not fit is returned unchanged, for the type check that follows to refuse with both types named.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _to_union(value, get_args(annotation))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = get_args(annotation)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(to_field_type(item, inner[0]) for item in value)
        if len(inner) == len(value):
            return tuple(to_field_type(item, kind) for item, kind in zip(value, inner, strict=True))
        return tuple(value)
    if origin is list and isinstance(value, (list, tuple)):
        return [to_field_type(item, get_args(annotation)[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        kind = get_args(annotation)[1]
        return {key.value if isinstance(key, Enum) else key: to_field_type(item, kind) for key, item in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, PolicyFeature):
        return PolicyFeature.from_value(value)
    if isinstance(annotation, type) and issubclass(annotation, Enum) and isinstance(value, str):
        if value.upper() not in annotation.__members__:
            raise InvalidConfigError(
                f"{annotation.__name__} {value!r} does not exist. {nearest(value, annotation.__members__)}"
            )
        return annotation[value.upper()]
    return value


def _to_union(value: Any, options: tuple) -> Any:
    for option in options:
        if isinstance(option, type) and type(value) is option:
            return value
    for option in options:
        if option is not types.NoneType:
            converted = to_field_type(value, option)
            if converted is not value:
                return converted
    return value


def read_as(value: Any, annotation: Any) -> Any:
    """Read a value from YAML or the command line as `annotation` says, and check that it is that.

    Raises:
        ValueError: it cannot be read as that type.
    """
    if isinstance(value, str):
        value = parse_text(value, annotation)
    value = to_field_type(value, annotation)
    try:
        type_validator("value", value, annotation)
    except TypeError as error:
        raise ValueError(f"{value!r} cannot be read as {type_words(annotation)}") from error
    return value


def parse_text(text: str, annotation: Any) -> Any:
    """Read a command-line or YAML string as `annotation` says, so that `1e-4` is a float where a float belongs.

    Raises:
        ValueError: the text cannot be read as that type.
    """
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if text.lower() in ("null", "none", "~") and types.NoneType in options:
        return None
    for option in options:
        if get_origin(option) is Literal:
            if text.lower() in ("true", "false") and True in get_args(option):
                return text.lower() == "true"
            if text in get_args(option):
                return text
        if option is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        elif get_origin(option) in (tuple, list) and (str not in options or text.startswith(("[", "("))):
            inner = get_args(option)[0]
            items = text.strip("[]() ").split(",")
            return to_field_type([parse_text(item.strip(), inner) for item in items if item.strip()], option)
        elif isinstance(option, type) and issubclass(option, Enum):
            return to_field_type(text, option)
        elif (get_origin(option) or option) is dict and text.lstrip().startswith("{"):
            try:
                return read_yaml(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{text!r} is not valid YAML: {error}") from error
    if str in options:
        return text
    raise ValueError(f"{text!r} cannot be read as {type_words(annotation)}")


def type_words(annotation: Any) -> str:
    """Return a type as messages and help name it: `int or null`."""
    if annotation is types.NoneType:
        return "null"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(type_words, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return " or ".join("true" if v is True else "false" if v is False else repr(v) for v in get_args(annotation))
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return re.sub(r"(?:\w+\.)+(?=\w)", "", str(annotation))
