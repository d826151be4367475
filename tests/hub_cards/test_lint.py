"""Each planted problem is found, and only that one."""

import pytest

from manipulators.hub_cards.card import render_card
from manipulators.hub_cards.lint import lint_card

PLANTED = [
    ("library_name: manipulators\n", "", "The metadata lacks library_name."),
    ("pipeline_tag: robotics\n", "", "The metadata lacks pipeline_tag."),
    ("license: apache-2.0\n", "", "The metadata lacks license."),
    ("pipeline_tag: robotics\n", "pipeline_tag: text-generation\n", "pipeline_tag is 'text-generation'"),
    ("license: apache-2.0", "license: apache2", "does not know the license 'apache2'"),
    ("license: apache-2.0", "license: other", "needs license_name"),
    ("## Limits\n", "## Notes\n", "The section “Limits” is missing."),
    ("## Limits\n", "## Limits\n\nTODO\n", "The placeholder “TODO” is left."),
    (
        'from_pretrained("your-lab/act-reach")',
        'from_pretrained("path/to/this/folder")',
        "“path/to/this/folder”",
    ),
    ("# ACT policy", "# {{ title }}", "The template mark “{{” is left."),
    ("## Limits\n", "## Limits\n\nSee /home/alice/runs/7.\n", "The path “/home/alice/runs/7.”"),
    ("## Limits\n", "## Limits\n\nSee `~/runs`.\n", "The path “~/runs”"),
    ("## Limits\n", "## Limits\n\nSee C:\\Users\\alice.\n", "The path “C:\\Users\\alice.”"),
    ("pipeline.reset()", "pipeline.reset(", "The Python example does not compile"),
    (
        "| 98 % (49 of 50",
        "| 88 % (49 of 50",
        "says “Success rate | 88 %” but model-index says success_rate 0.98",
    ),
    ("Solves 49 of 50", "Solves 50 of 50", "says “Solves 50 of 50” but model-index says success_rate 0.98"),
    ("## Limits\n", "## Limits\n\nIt has not been evaluated.\n", "The text says both “Solves 49 of 50”"),
    ("type: success_rate", "type: accuracy", "the metadata has no success_rate in model-index"),
    ("  results:\n", "  outcomes:\n", "huggingface_hub cannot read the metadata"),
]


@pytest.mark.parametrize(("old", "new", "problem"), PLANTED, ids=[problem[:40] for *_, problem in PLANTED])
def test_planted_problem_is_found(full_card, old, new, problem):
    text = render_card(full_card)
    assert old in text
    problems = lint_card(text.replace(old, new, 1))
    assert any(problem in found for found in problems), problems


def test_a_clean_card_has_no_problems(full_card, make_card):
    assert lint_card(render_card(full_card)) == []
    assert lint_card(render_card(make_card())) == []


def test_an_evaluation_in_the_metadata_alone_is_found(full_card, make_card):
    evaluated, plain = render_card(full_card), render_card(make_card())
    metadata = evaluated.split("---\n")[1]
    body = plain.split("---\n", 2)[2]
    assert lint_card(f"---\n{metadata}---\n{body}") == [
        "The metadata has a success_rate of 0.98 in model-index but the text states none."
    ]


def test_text_without_usable_metadata_is_one_problem():
    assert lint_card("# My policy\n") == [
        "The card has no metadata: it must start with a YAML block between two lines of ---."
    ]
    assert "not valid YAML" in lint_card("---\nlicense: [mit\n---\n")[0]
    assert lint_card("---\n- mit\n---\n") == ["The metadata must be a mapping of names to values."]


def test_no_false_alarm_for_addresses_fractions_and_bibtex(full_card):
    harmless = (
        "\nSee https://example.org/a/b, [data](/datasets/org/name), <b>x</b>, m/s/s and and/or/not.\n"
        "\n```bibtex\n@misc{a, title={{ACT}}}\n```\n"
    )
    assert lint_card(render_card(full_card) + harmless) == []
