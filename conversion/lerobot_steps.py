"""LeRobot's two processors, policy_preprocessor.json and policy_postprocessor.json: every step and field is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import read_json
from ..checkpoint import listing
from ..configuration.features import FeatureType, NormalizationMode, PolicyFeature
from ..errors import CheckpointError, CorruptFileError, InvalidConfigError, MissingFileError, nearest
from ..modeling.loading import read_tensors
from .published_policy import is_off

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
RENAME, TOKENIZER, NEW_LINE = "rename_observations_processor", "tokenizer_processor", "pi0_new_line_processor"
STATE_TEXT = "pi05_prepare_state_tokenizer_processor_step"
DEFAULT_LENGTH, DEFAULT_EPS = 512, 1e-8  # of a tokenizer step, and of a normalizer, that name none


def _anything(value: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, (list, type(None))) and all(map(_text, value or ()))


def _mapping_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _small_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is known or value == known for known in values)


def _features(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_feature, value.values()))


def _is_feature(value: Any) -> bool:
    try:
        PolicyFeature.from_value(value)
    except InvalidConfigError:
        return False
    return True


def _modes(value: Any) -> bool:
    kinds, modes = ("STATE", "VISUAL", "ENV", "ACTION"), NormalizationMode.__members__
    named = isinstance(value, dict) and value.keys() <= set(kinds) and all(map(_text, value.values()))
    return named and all(mode in modes for mode in value.values())


_NORMALIZATION = {
    "eps": _small_number,
    "features": _features,
    "norm_map": _modes,
    "normalize_observation_keys": _one_of(None),
}
# Steps of the preprocessor → their fields, each with what may stand there. `device` is a matter of the machine, and
# `tokenizer_name` of who loads: a tokenizer is given as `tokenizer=`.
BEFORE: dict[str, dict[str, Callable[[Any], bool]]] = {
    RENAME: {"rename_map": _mapping_of_names},
    "to_batch_processor": {},
    NEW_LINE: {},
    STATE_TEXT: {},
    TOKENIZER: {
        "max_length": _size,
        "task_key": _one_of("task"),
        "padding_side": _one_of("right"),
        "padding": _one_of("max_length"),
        "truncation": _one_of(True),
        "tokenizer_name": _text,
    },
    "device_processor": {"device": _anything, "float_dtype": _one_of(None, "float32")},
    RELATIVE: {"enabled": _truth, "exclude_joints": _names, "action_names": _names},
    NORMALIZER: _NORMALIZATION,
}
AFTER = {name: BEFORE[name] for name in ("to_batch_processor", "device_processor")}
AFTER |= {UNNORMALIZER: _NORMALIZATION, ABSOLUTE: {"enabled": _truth}}
# Steps of which each reads what the one before it has made.
_ORDER = (
    (RENAME, RELATIVE, NORMALIZER),
    (NEW_LINE, TOKENIZER),
    (NORMALIZER, STATE_TEXT),
    (STATE_TEXT, TOKENIZER),
    (UNNORMALIZER, ABSOLUTE),
)
_REPEATABLE = ("to_batch_processor", "device_processor")


class Processors:
    """Hold what LeRobot's two processors say.

    Args:
        folder: of the checkpoint.

    Attributes:
        names: of all steps.
        normalizer, unnormalizer: their config, and `statistics` by feature.
        rename_map: name in an observation → name of the feature.
        relative: the config of the step that makes actions relative; None where they are absolute.
        max_instruction_tokens: of the tokenizer; None without one.
        text_steps: which of the steps that prepare an instruction are there.

    Raises:
        MissingFileError, CorruptFileError: a file is absent or cannot be read.
        CheckpointError: a step, a field or an order that is not done here.
    """

    def __init__(self, folder: Path):
        if not (folder / PREPROCESSOR).is_file() or not (folder / POSTPROCESSOR).is_file():
            raise MissingFileError(
                f"{folder} holds no {PREPROCESSOR} and {POSTPROCESSOR}, where LeRobot 0.4 and later keep the "
                f"statistics, nor are there any among the weights, as in 0.1 to 0.3; it holds {listing(folder)}. "
                f"Without statistics a policy's actions mean nothing."
            )
        before, after = read_steps(folder / PREPROCESSOR), read_steps(folder / POSTPROCESSOR)
        only = _only(folder, before, NORMALIZER), _only(folder, after, UNNORMALIZER)
        for path, steps, known in ((PREPROCESSOR, before, BEFORE), (POSTPROCESSOR, after, AFTER)):
            _check_steps(folder / path, steps, known)
        self.normalizer, self.unnormalizer = (_normalizer(folder, step) for step in only)
        found = {step["registry_name"]: step["config"] for step in (*before, *after)}
        self.names = tuple(found)
        self.rename_map: dict[str, str] = found.get(RENAME, {}).get("rename_map", {})
        relative, absolute = (found.get(name, {}).get("enabled", False) for name in (RELATIVE, ABSOLUTE))
        if relative != absolute:
            raise CheckpointError(
                f"{folder} makes actions relative ({RELATIVE}: enabled={relative}) and absolute again ({ABSOLUTE}: "
                f"enabled={absolute}); both are on, or both off."
            )
        self.relative = found[RELATIVE] if relative else None
        length = found[TOKENIZER].get("max_length", DEFAULT_LENGTH) if TOKENIZER in found else None
        self.max_instruction_tokens: int | None = length
        self.text_steps = [name for name in (NEW_LINE, STATE_TEXT, TOKENIZER) if name in found]
        if self.normalizer["eps"] != self.unnormalizer["eps"]:
            raise CheckpointError(
                f"{folder} normalises with eps={self.normalizer['eps']} and un-normalises with "
                f"eps={self.unnormalizer['eps']}, which is not done here."
            )

    def check_agreement(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], text_steps: Sequence[str] = ()
    ) -> None:
        """Check that the features of config.json are those that are normalised, and that instructions are prepared.

        Args:
            inputs, outputs: the features.
            text_steps: the steps that prepare an instruction; none where the policy reads none.

        Raises:
            CheckpointError: one is left out, is of another kind or shape, or actions have another mode on the way
                back; or a step is absent by which instructions are prepared.
        """
        for step, features in ((self.normalizer, {**inputs, **outputs}), (self.unnormalizer, outputs)):
            for name, feature in features.items():
                _check_feature(step, name, PolicyFeature.from_value(feature))
        modes = [step["norm_map"].get("ACTION", "IDENTITY") for step in (self.normalizer, self.unnormalizer)]
        if modes[0] != modes[1]:
            raise CheckpointError(f"Actions are normalised with {modes[0]} and un-normalised with {modes[1]}.")
        absent = [name for name in text_steps if name not in self.text_steps]
        if absent:
            raise CheckpointError(
                f"{PREPROCESSOR} lacks {', '.join(absent)}, so the policy was trained on other instructions than are "
                f"written here."
            )
        if text_steps and (unread := [name for name in self.text_steps if name not in text_steps]):
            raise CheckpointError(f"{PREPROCESSOR} runs {', '.join(unread)}, which this policy's prompts have not.")

    def relative_to(self, width: int) -> list[int | None] | None:
        """Return the state dimension that each action dimension is relative to; None where all are absolute."""
        return None if self.relative is None else relative_to(self.relative, width)


def _check_feature(step: Mapping[str, Any], name: str, expected: PolicyFeature) -> None:
    """Check that a normalizer treats a feature as config.json describes it; a camera may have another size."""
    if step["norm_map"].get(expected.type.value, "IDENTITY") == "IDENTITY":
        return
    listed = PolicyFeature.from_value(step["features"][name]) if name in step["features"] else None
    seen = slice(1) if expected.type is FeatureType.VISUAL else slice(None)  # of a camera the channels alone
    if listed is None or listed.type is not expected.type or listed.shape[seen] != expected.shape[seen]:
        raise CheckpointError(
            f"A step that normalises lists {name!r} as {listed}, and config.json as {expected}: LeRobot leaves out "
            f"what is not listed. Make them agree."
        )


def relative_to(step: Mapping[str, Any], width: int) -> list[int | None]:
    """Return the state dimension that each action dimension is relative to: its own, unless its name is excluded."""
    excluded = [name.lower() for name in step.get("exclude_joints") or () if name]
    names = [name.lower() for name in step.get("action_names") or ()]
    names += [""] * (width - len(names))
    return [None if any(word in names[i] for word in excluded) else i for i in range(width)]


def read_steps(path: Path) -> list[dict]:
    """Return the steps of a processor file.

    Raises:
        CorruptFileError: it holds something else, or more.
    """
    content = read_json(path)
    _refuse_unknown(path, "", content, ("name", "steps"))
    steps = content.get("steps")
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("registry_name"), str) and isinstance(step.get("config"), dict)
        for step in steps
    ):
        raise CorruptFileError(path, "list of processor steps", "steps must each have a registry_name and a config")
    for step in steps:
        _refuse_unknown(path, f" in {step['registry_name']}", step, ("registry_name", "config", "state_file"))
        if not isinstance(step.get("state_file"), (str, type(None))):
            raise CorruptFileError(path, "list of processor steps", f"state_file={step['state_file']!r} is no name")
    return steps


def state_files(folder: Path) -> list[str]:
    """Return the names of the files in which processor steps keep their tensors."""
    paths = [folder / name for name in (PREPROCESSOR, POSTPROCESSOR) if (folder / name).is_file()]
    steps = [step for path in paths for step in read_steps(path)]
    return sorted({Path(step["state_file"]).name for step in steps if step.get("state_file")})


def _refuse_unknown(path: Path, where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    for name, value in given.items():
        if name not in known and not is_off(value):
            raise CheckpointError(
                f"{path} has {name}={value!r}{where}, which this library does not know: it may change what the policy "
                f"sees or does. {nearest(name, known)} If it changes nothing, remove it."
            )


def _check_steps(path: Path, steps: Sequence[dict], known: Mapping[str, Mapping[str, Callable[[Any], bool]]]) -> None:
    """Check that every step, its fields and their order are done here too.

    Raises:
        CheckpointError: one is not.
    """
    names = [step["registry_name"] for step in steps]
    if unknown := [name for name in names if name not in known]:
        raise CheckpointError(
            f"{path} runs processor steps that do not exist here: {', '.join(unknown)}. Without them the "
            f"policy would act on other numbers than it was trained on. Known: {', '.join(sorted(known))}."
        )
    for step in steps:
        name, fields = step["registry_name"], known[step["registry_name"]]
        _refuse_unknown(path, f" in {name}", step["config"], fields)
        for field, value in step["config"].items():
            if field in fields and not fields[field](value):
                raise CheckpointError(f"{path} has {field}={value!r} in {name}, which is not done here.")
        if step.get("state_file") and name not in (NORMALIZER, UNNORMALIZER):
            raise CheckpointError(f"{path} has state_file={step['state_file']!r} in {name}, which is not read here.")
    for order in _ORDER:
        found = [name for name in names if name in order]
        if found != [name for name in order if name in found]:
            raise CheckpointError(
                f"{path} runs {', '.join(found)}; here each is done once, in the order {', '.join(order)}."
            )


def _only(folder: Path, steps: Sequence[dict], name: str) -> dict:
    found = [step for step in steps if step["registry_name"] == name]
    if len(found) != 1:
        kind = name.removesuffix("_processor")
        names = ", ".join(step["registry_name"] for step in steps)
        raise CheckpointError(f"{folder} should have one {kind} among its processor steps; it has: {names}.")
    return found[0]


def _normalizer(folder: Path, step: dict) -> dict[str, Any]:
    """Return the config of a normalizer, complete, with its `statistics`."""
    config = {"eps": DEFAULT_EPS, "features": {}} | step["config"]
    if "norm_map" not in config:
        raise CheckpointError(f"{folder} has a {step['registry_name']} without a norm_map, which says how.")
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    if step.get("state_file"):
        # A file name only: a checkpoint must not reach outside its folder.
        for key, value in read_tensors(folder / Path(step["state_file"]).name).items():
            feature, _, which = key.rpartition(".")
            statistics.setdefault(feature, {})[which] = value.float().flatten()
    return config | {"statistics": statistics}
