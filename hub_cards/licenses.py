"""Which licence holds for a policy's weights: that of the weights they derive from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

INHERITED = "The weights derive from another checkpoint, whose licence holds for them."


class License(NamedTuple):
    """A licence as the Hub's metadata name it."""

    id: str
    name: str | None = None
    link: str | None = None


class _Origin(NamedTuple):
    license: License
    note: str


_GEMMA = _Origin(
    License("gemma", None, "https://ai.google.dev/gemma/terms"),
    "The weights derive from {title}, which was built on PaliGemma: the Gemma Terms of Use hold for them.",
)
_NVIDIA = _Origin(
    License("other", "nvidia-license", "https://huggingface.co/{base}"),
    "The weights derive from NVIDIA's {title}, whose licence holds for them: read it at "
    "https://huggingface.co/{base} before you use or share them.",
)
# Of policies whose published weights bring a licence of their own.
_ORIGINS: dict[str, tuple[_Origin, str]] = {
    "pi0_policy": (_GEMMA, "lerobot/pi0_base"),
    "pi05_policy": (_GEMMA, "lerobot/pi05_base"),
    "gr00t_n1": (_NVIDIA, "nvidia/GR00T-N1-2B"),
    "gr00t_n1_5": (_NVIDIA, "nvidia/GR00T-N1.5-3B"),
}
# Nobody trains as many weights from scratch on a robot's demonstrations.
_PUBLISHED_SIZE = 500_000_000


def license_fields(
    model_type: str, title: str, parameters: int, derived: bool | None, of_base: License | None = None
) -> dict[str, str | None]:
    """Return `license`, `license_name`, `license_link` and `license_note` of a card; empty where ours holds.

    Args:
        model_type: of the policy.
        title: what it is called in text.
        parameters: numbers in its weights.
        derived: whether it was made from another checkpoint; None where that is not recorded.
        of_base: the licence of that checkpoint, where it is known.
    """
    if derived is None:
        derived = parameters >= _PUBLISHED_SIZE
    if not derived:
        return {}
    if of_base is not None:
        return _fields(of_base, INHERITED)
    if model_type not in _ORIGINS:
        return {}
    origin, base = _ORIGINS[model_type]
    link = origin.license.link.format(base=base)
    return _fields(origin.license._replace(link=link), origin.note.format(title=title, base=base))


def license_of_card(text: str | None) -> License | None:
    """Return the licence that a README.md states, if it states a single one."""
    stated = metadata_of_card(text)
    if not isinstance(stated.get("license"), str):
        return None
    return License(stated["license"], stated.get("license_name"), stated.get("license_link"))


def metadata_of_card(text: str | None) -> Mapping[str, Any]:
    """Return the metadata of a README.md; none where they cannot be read."""
    match = REGEX_YAML_BLOCK.search(text or "")
    try:
        metadata = yaml.safe_load(match.group(2)) if match else {}
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, Mapping) else {}


def _fields(found: License, note: str) -> dict[str, str | None]:
    ours = found.id == "apache-2.0"
    return {
        "license": found.id,
        "license_name": found.name,
        "license_link": found.link,
        "license_note": "" if ours else note,
    }
