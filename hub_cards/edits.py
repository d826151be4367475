"""Tell cards that this library wrote from cards that a person edited: an edited one is never overwritten."""

from __future__ import annotations

import hashlib
import re

_MARKER = re.compile(r"<!-- written by manipulators;[^>]*sha256=([0-9a-f]{64}) -->\n?")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def sign(text: str) -> str:
    """Return the card with a comment, invisible on the Hub, that holds a hash of everything else in it."""
    text = _unsigned(text)
    promise = "a card changed by hand is never overwritten"
    marker = f"<!-- written by manipulators; {promise}. sha256={_hash(text)} -->\n"
    front_matter = _FRONT_MATTER.match(text)
    start = front_matter.end() if front_matter else 0
    return text[:start] + marker + text[start:]


def was_edited(text: str) -> bool:
    """Return True when a person wrote or changed the card: its marker is absent or its hash does not match.

    Line endings and white space at the ends of lines do not count, since editors and git change them unasked.
    """
    marker = _MARKER.search(_plain(text))
    return marker is None or marker.group(1) != _hash(_unsigned(text))


def keep_edited(existing: str | None, rendered: str) -> str:
    """Return the text to save: `existing` when a person edited it, otherwise `rendered`.

    None or blank text is no card, so `rendered` takes its place.
    """
    if existing and existing.strip() and was_edited(existing):
        return existing
    return rendered


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def _unsigned(text: str) -> str:
    return _MARKER.sub("", _plain(text))


def _hash(unsigned: str) -> str:
    return hashlib.sha256(unsigned.encode()).hexdigest()
