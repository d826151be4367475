"""Check a card before it is published."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .edits import was_edited
from .wording import PLACEHOLDER

SECTIONS = (
    "What it does",
    "What it expects and returns",
    "How to use",
    "Training data",
    "Training",
    "Evaluation",
    "Limits",
    "Citation",
)
REQUIRED_METADATA = ("library_name", "pipeline_tag", "license", "tags")
FIXED_METADATA = {"library_name": "manipulators", "pipeline_tag": "robotics"}

# The licence ids that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses) and that occur on
# models; a licence outside the list is published as `other` with license_name.
# fmt: off
LICENSES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "h-research",
    "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense",
    "wtfpl", "zlib",
})
# fmt: on

_PLACEHOLDERS = re.compile(
    r"path/to/this/folder|\[?more information needed\]?|\bTODO\b|\b(?:TBD|FIXME|lorem ipsum)\b|<your[^>]*>",
    re.IGNORECASE,
)
_FENCED = re.compile(
    r"^(?P<ticks>`{3,})(?P<language>\w*)[^`\n]*\n(?P<code>.*?)^(?P=ticks)[ \t]*$", re.MULTILINE | re.DOTALL
)
# Two or more components after a slash that starts a word: not a web address, a fraction, an HTML end tag or
# the target of a Markdown link, which the Hub reads relative to itself.
_LOCAL_PATH = re.compile(
    r"(?<![\w/:.<*~-])(?<!\]\()/[\w.-]+(?:/[\w.-]+)+|(?<!\w)~/[\w./-]+|file://\S+|\b[A-Za-z]:\\[\w.\\-]+"
)
_SOLVED = re.compile(r"\bsolves (\d+) of (\d+)\b", re.IGNORECASE)
_RATE = re.compile(r"success rate(?: of|:)?\s*\|?\s*(\d+(?:\.\d+)?) ?%", re.IGNORECASE)
_NOT_EVALUATED = re.compile(r"\bnot been evaluated\b|\bnot evaluated\b", re.IGNORECASE)
_PERCENT_TOLERANCE = 0.06  # the text has one decimal


def lint_card(text: str) -> list[str]:
    """Return what is wrong with a card, one sentence each; an empty list means fit to publish.

    Looks for missing or unknown metadata, missing sections, placeholders, template marks, paths of somebody's
    computer, and an evaluation on which text and metadata disagree. The place of the repository's name may be open in
    a card that nobody edited: publishing fills it in.
    """
    match = REGEX_YAML_BLOCK.search(text)
    if not match:
        return ["The card has no metadata: it must start with a YAML block between two lines of ---."]
    body = text[match.end() :]
    try:
        metadata = yaml.safe_load(match.group(2)) or {}
    except yaml.YAMLError as error:
        return [f"The metadata is not valid YAML: {' '.join(str(error).split())}."]
    if not isinstance(metadata, dict):
        return ["The metadata must be a mapping of names to values."]
    return [
        *_metadata_problems(metadata, text),
        *_body_problems(body),
        *_leftovers(text),
        *_evaluation_problems(metadata, body),
    ]


def _metadata_problems(metadata: dict, text: str) -> Iterator[str]:
    for key in REQUIRED_METADATA:
        if not metadata.get(key):
            yield f"The metadata lacks {key}."
    for key, value in FIXED_METADATA.items():
        if metadata.get(key) and metadata[key] != value:
            yield f"{key} is {metadata[key]!r}; the Hub finds these policies under {value!r}."
    licenses = metadata.get("license") or []
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES:
            yield (
                f"The Hub does not know the license {name!r}. Use its id, such as apache-2.0, "
                f"or `other` with license_name."
            )
        elif name == "other" and not metadata.get("license_name"):
            yield "The license `other` needs license_name, and license_link or a LICENSE file."
    try:
        ModelCard(text)
    except Exception as error:  # whatever the client trips over, a reader's client will trip over too
        yield f"huggingface_hub cannot read the metadata: {error}."


def _body_problems(body: str) -> Iterator[str]:
    headings = set(re.findall(r"^## +(.+?) *$", _FENCED.sub("", body), re.MULTILINE))
    for section in SECTIONS:
        if section not in headings:
            yield f"The section “{section}” is missing."
    for _, language, code in _FENCED.findall(body):
        if language == "python":
            try:
                compile(code, "README.md", "exec")
            except SyntaxError as error:
                yield f"The Python example does not compile: {error.msg} in “{(error.text or '').strip()}”."


def _leftovers(text: str) -> Iterator[str]:
    placeholders = dict.fromkeys(match.group() for match in _PLACEHOLDERS.finditer(text))
    if not was_edited(text):  # such a card is written anew where it is published, under the repository's name
        placeholders.pop(PLACEHOLDER, None)
    for placeholder in placeholders:
        yield f"The placeholder “{placeholder}” is left."
    # BibTeX writes {{Title}} to keep capital letters.
    without_bibtex = _FENCED.sub(lambda fence: "" if fence["language"] == "bibtex" else fence[0], text)
    for mark in ("{{", "{%"):
        if mark in without_bibtex:
            yield f"The template mark “{mark}” is left."
    for path in dict.fromkeys(match.group() for match in _LOCAL_PATH.finditer(text)):
        yield f"The path “{path}” exists only on the computer it was written on."


def _evaluation_problems(metadata: dict, body: str) -> Iterator[str]:
    recorded = _recorded_rates(metadata)
    body = _FENCED.sub("", body)
    stated = [(match.group(), 100 * int(match[1]) / max(int(match[2]), 1)) for match in _SOLVED.finditer(body)]
    stated += [(match.group(), float(match[1])) for match in _RATE.finditer(body)]
    if stated and _NOT_EVALUATED.search(body):
        yield f"The text says both “{stated[0][0]}” and that the policy has not been evaluated."
    if stated and not recorded:
        yield f"The text says “{stated[0][0]}” but the metadata has no success_rate in model-index."
    if recorded and not stated:
        yield f"The metadata has a success_rate of {recorded[0]} in model-index but the text states none."
    for words, rate in stated if recorded else ():
        if all(abs(rate - 100 * value) > _PERCENT_TOLERANCE for value in recorded):
            values = ", ".join(map(str, recorded))
            yield f"The text says “{words}” but model-index says success_rate {values}."


def _recorded_rates(metadata: dict) -> list[float]:
    """Return every success rate in model-index, 0 to 1; `ModelCard` reports malformed entries."""
    models = metadata.get("model-index")
    rates = []
    for model in models if isinstance(models, list) else ():
        for result in model.get("results") or () if isinstance(model, dict) else ():
            for metric in result.get("metrics") or () if isinstance(result, dict) else ():
                if isinstance(metric, dict) and metric.get("type") == "success_rate":
                    rates.append(metric.get("value"))
    return [rate for rate in rates if isinstance(rate, (int, float))]
