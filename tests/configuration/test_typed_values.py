"""What JSON, YAML and the command line can say becomes what a typed field holds."""

from typing import Any, Literal

import pytest

from manipulators import NormalizationMode, PolicyFeature
from manipulators.configuration.typed_values import parse_text, to_field_type
from manipulators.errors import InvalidConfigError


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, float, 3.0),
        (3, float | None, 3.0),
        (None, float | None, None),
        (3, int | float, 3),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([8, 9], tuple[int, int] | None, (8, 9)),
        ((1, 2), list[float], [1.0, 2.0]),
        ([[1, 2], [3, 4]], tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
        ("min_max", NormalizationMode, NormalizationMode.MIN_MAX),
        ({"STATE": "MIN_MAX"}, dict[str, NormalizationMode], {"STATE": NormalizationMode.MIN_MAX}),
        ({"a": {"type": "STATE", "shape": [2]}}, dict[str, PolicyFeature], {"a": PolicyFeature("STATE", (2,))}),
    ],
)
def test_conversion(value, annotation, expected):
    converted = to_field_type(value, annotation)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"), [("3", int), (3.5, int), (True, float), ("x", float), (3, str), (1, bool)]
)
def test_what_would_lose_something_stays_for_the_type_check(value, annotation):
    assert to_field_type(value, annotation) is value


def test_unknown_member_names_the_nearest():
    with pytest.raises(InvalidConfigError, match="Did you mean 'MEAN_STD'"):
        to_field_type("MEANSTD", NormalizationMode)


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("1e-4", float, 0.0001),
        ("1e-4", float | None, 0.0001),
        ("3", float, 3.0),
        ("3", int, 3),
        ("3", int | float, 3),
        ("3.5", int | float, 3.5),
        ("null", float | None, None),
        ("None", int | None, None),
        ("~", str | None, None),
        ("null", str, "null"),
        ("true", bool, True),
        ("False", bool, False),
        ("false", bool | Literal["lora"] | None, False),
        ("lora", bool | Literal["lora"] | None, "lora"),
        ("gelu", Literal["relu", "gelu"], "gelu"),
        ("84,96", tuple[int, int] | None, (84, 96)),
        ("[84, 96]", tuple[int, ...], (84, 96)),
        ("(0.9, 0.95)", tuple[float, float], (0.9, 0.95)),
        ("", tuple[int, ...], ()),
        ("a, b", list[str], ["a", "b"]),
        ("min_max", NormalizationMode, NormalizationMode.MIN_MAX),
        ("{a: 1}", dict[str, int] | None, {"a": 1}),
        ("microsoft/resnet-18", str | None, "microsoft/resnet-18"),
    ],
)
def test_text(text, annotation, expected):
    value = parse_text(text, annotation)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("yes", bool),
        ("1", bool),
        ("1e3", int),
        ("2.5", int),
        ("x", float),
        ("null", int),
        ("selu", Literal["relu", "gelu"]),
        ("a,b", tuple[int, ...]),
        ("a: 1", dict[str, int]),
    ],
)
def test_text_that_cannot_be_read(text, annotation):
    with pytest.raises(ValueError, match="cannot be read as"):
        parse_text(text, annotation)


def test_numbers_without_a_dot_are_numbers_in_mappings_too():
    """As in JSON, which a mapping on the command line is often copied from."""
    text = '{"eps": 1e-06, "lr": 2.5E5, "name": "1e-06", "id": e10, "hex": 0x1e5}'
    found = parse_text(text, dict[str, Any])
    assert found == {"eps": 1e-06, "lr": 2.5e5, "name": "1e-06", "id": "e10", "hex": 0x1E5}
