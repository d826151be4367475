"""Which licence a card states: the base's for what derives from it, ours for what was trained from scratch."""

import json
import shutil

import pytest

from manipulators.hub_cards.card import render_card
from manipulators.hub_cards.checkpoint_card import checkpoint_card, write_checkpoint_card
from manipulators.hub_cards.licenses import License, license_fields, license_of_card
from manipulators.hub_cards.lint import lint_card


@pytest.fixture
def folder(tmp_path, request):
    """A checkpoint of a tiny GR00T, without records."""
    source = request.config.rootpath / "tests" / "checkpoints" / "gr00t_n1_5"
    return shutil.copytree(source, tmp_path / "policy", ignore=shutil.ignore_patterns("README.md", "training.json"))


def put(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_a_policy_from_scratch_has_this_librarys(folder):
    assert checkpoint_card(folder).license == "apache-2.0"
    put(folder, "training.json", {"recipe": {"base": None}})
    assert checkpoint_card(folder).license == "apache-2.0"
    assert "## License" not in render_card(checkpoint_card(folder))


@pytest.mark.parametrize("said_by", ["argument", "training.json"])
def test_a_fine_tuned_gr00t_has_nvidias(folder, said_by):
    base = "nvidia/GR00T-N1.5-3B"
    if said_by == "training.json":
        put(folder, "training.json", {"recipe": {"base": base}})
    write_checkpoint_card(folder, "your-lab/gr00t", base=base if said_by == "argument" else None)
    for _ in range(2):  # written again, it knows the licence from itself
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert license_of_card(text) == License("other", "nvidia-license", f"https://huggingface.co/{base}")
        assert "The weights derive from NVIDIA's GR00T N1.5, whose licence holds for them: read it at" in text
        assert "apache" not in text.lower()
        assert lint_card(text) == []
        write_checkpoint_card(folder, "your-lab/gr00t")


def test_a_local_base_passes_its_own_on(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    assert checkpoint_card(folder, base=base).license == "apache-2.0"  # it was trained from scratch itself
    put(base, "README.md", "---\nlicense: mit\n---\nMine.\n")
    card = checkpoint_card(folder, base=base)
    assert (card.license, card.base_model) == ("mit", None)
    put(base, "README.md", "---\nlicense: [\n---\n")
    assert checkpoint_card(folder, base=base).license == "apache-2.0"


def test_weights_of_published_size_were_not_trained_from_scratch():
    assert license_fields("pi0_policy", "π0", 3_500_000_000, None)["license"] == "gemma"
    assert license_fields("pi0_policy", "π0", 3_500_000_000, False) == {}
    assert license_fields("pi0_policy", "π0", 1_000_000, None) == {}
    assert license_fields("act_policy", "ACT", 1_000_000, True) == {}
