"""What several commands read from their arguments: pairs, and lists of numbers with ranges."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InvalidConfigError


def pairs(option: str, words: Sequence[str], form: str) -> dict[str, str] | None:
    """Read `left=right` for every word; None where there are none.

    Raises:
        InvalidConfigError: a word is no pair; the message shows the `form` of one.
    """
    for word in words:
        if not all(word.partition("=")):
            raise InvalidConfigError(f"{option} {word!r} is no pair; write {form}")
    return {left: right for left, _, right in (word.partition("=") for word in words)} or None


def numbers(option: str, words: Sequence[str]) -> list[int]:
    """Read `0-3,7`, also as several words: [0, 1, 2, 3, 7].

    Raises:
        InvalidConfigError: something else is in it, or a range that ends before it begins.
    """
    found: list[int] = []
    for part in (part for word in words for part in word.split(",") if part.strip()):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InvalidConfigError(f"{option} {part!r} is no number and no range of numbers; write 0-3,7")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise InvalidConfigError(f"{option} names no number; write 0-3,7")
    return found
