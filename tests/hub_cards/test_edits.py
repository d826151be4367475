"""A person's edits are told from what the library wrote, and kept."""

import pytest

from manipulators.hub_cards.card import render_card
from manipulators.hub_cards.edits import keep_edited, sign, was_edited


def test_a_rendered_card_is_not_edited(full_card, make_card):
    assert not was_edited(render_card(full_card))
    assert not was_edited(render_card(make_card()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## Limits\n", "## Limits\n\n- Only in daylight.\n"),
        ("license: apache-2.0", "license: mit"),
        ("49 of 50", "50 of 50"),
        ("<!-- written by manipulators;", "<!-- "),
    ],
)
def test_every_change_counts(full_card, old, new):
    text = render_card(full_card)
    assert old in text
    assert was_edited(text.replace(old, new))


def test_white_space_that_editors_change_does_not_count(full_card):
    text = render_card(full_card)
    assert not was_edited(text.replace("\n", "\r\n"))
    assert not was_edited(text.rstrip("\n"))
    assert not was_edited(text + "\n\n")


def test_the_marker_stands_after_the_metadata_and_replaces_an_old_one():
    signed = sign("---\nlicense: mit\n---\n# Title\n")
    assert signed.startswith("---\nlicense: mit\n---\n<!-- written by manipulators; a card changed by hand")
    assert signed.endswith(" -->\n# Title\n")
    assert sign(signed) == signed


def test_keep_edited_returns_what_to_save(full_card):
    rendered = render_card(full_card)
    older = sign("# Older\n")
    assert keep_edited(None, rendered) == rendered
    assert keep_edited(" \n", rendered) == rendered
    assert keep_edited(older, rendered) == rendered
    assert keep_edited("# Mine\n", rendered) == "# Mine\n"
    assert keep_edited(older + "And more.\n", rendered) == older + "And more.\n"
