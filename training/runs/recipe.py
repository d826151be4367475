"""Recipes: a training run as a short YAML file, in which every value is read as the type of its field."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ... import auto  # noqa: F401  (registers the policies that a recipe can name)
from ...configuration.typed_values import read_as, read_yaml
from ...errors import InvalidConfigError, InvalidRecipeError, nearest
from ...modeling import registry
from ...plugins import load_plugins
from ..augmentation import Augmentation


@dataclass
class Recording:
    """Describe how a dataset that does not exist yet is recorded.

    Args:
        environment: `<family>/<task>` with a scripted expert; several for several instructions.
        episodes: number of successful episodes of each environment.
        seed: seed of the first episode; the others follow.
    """

    environment: str | list[str]
    episodes: int = 50
    seed: int = 0

    @property
    def total_episodes(self) -> int:
        """Episodes of all environments."""
        return self.episodes * (1 if isinstance(self.environment, str) else len(self.environment))


@dataclass
class MixtureEntry:
    """Describe one dataset of a mixture.

    Args:
        dataset: LeRobot dataset, a folder or Hub id.
        weight: its weight in the mixture, see `weights_by`.
        embodiment: its robot; datasets of one robot share statistics, those of another have their own where the policy
            knows robots. By default all are of one.
        name: for logs and messages; by default the folder's, or the Hub id.
        record: how the folder is recorded when it does not exist.
        episodes: the numbers of the episodes to use; all by default.
        features: the features to read beside `action`; all by default. `inputs` of the recipe goes before.
        revision, tolerance_s, rename_map, decoded_cache: see `LeRobotDataset`.
    """

    dataset: str
    weight: float = 1.0
    embodiment: str | None = None
    name: str | None = None
    record: Recording | None = None
    episodes: list[int] | None = None
    features: list[str] | None = None
    revision: str | None = None
    tolerance_s: float = 1e-4
    rename_map: dict[str, str] | None = None
    decoded_cache: str | None = None

    @property
    def is_to_record(self) -> bool:
        """Whether the recipe says how the dataset is recorded, and nobody has done so yet."""
        return self.record is not None and not Path(self.dataset).exists()


@dataclass
class DataSection:
    """Describe the demonstrations.

    Args:
        dataset: LeRobot dataset, a folder or Hub id; or several, as `mixture`.
        record: how the folder is recorded when it does not exist.
        episodes: the numbers of the episodes to use; all by default.
        features: the features to read beside `action`; all by default. `inputs` of the recipe goes before.
        revision, tolerance_s, rename_map, decoded_cache: see `LeRobotDataset`.
        fps: the rate at which actions follow each other [Hz]; of a dataset of a multiple of it, steps are left out.
            By default that of the dataset.
        weights_by: what the weights of a mixture are of. `frames`: every sample of a dataset has its weight;
            `dataset`: the dataset as a whole has, however long it is.
        mixture: several datasets, each with its weight and its robot, in place of `dataset`.
        streaming: download files when their turn comes, and keep them for a while only; `max_steps` is needed.
        shuffle_buffer, cache_gb, cache_folder: of a stream; see `StreamingLeRobotDataset`.
    """

    dataset: str | None = None
    record: Recording | None = None
    episodes: list[int] | None = None
    features: list[str] | None = None
    revision: str | None = None
    tolerance_s: float = 1e-4
    rename_map: dict[str, str] | None = None
    decoded_cache: str | None = None
    fps: float | None = None
    weights_by: Literal["frames", "dataset"] = "frames"
    mixture: list[MixtureEntry] | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    cache_gb: float | None = None
    cache_folder: str | None = None

    def __post_init__(self):
        own = ("dataset", "record", "episodes", "features", "revision", "rename_map", "decoded_cache")
        given = [name for name in own if getattr(self, name) is not None]
        if self.mixture is not None and given:
            raise InvalidConfigError(
                f"{given[0]} and mixture exclude each other: each dataset of a mixture has its own {given[0]}"
            )
        if self.mixture is not None and self.streaming:
            raise InvalidConfigError(
                "streaming and mixture exclude each other: samples of a mixture are read by number"
            )
        if not self.mixture and self.dataset is None:
            raise InvalidConfigError("it lacks dataset, or several datasets as mixture")
        if self.fps is not None and not self.fps > 0:
            raise InvalidConfigError(f"fps={self.fps} must be above 0")

    @property
    def entries(self) -> list[MixtureEntry]:
        """The datasets: those of the mixture, or the only one."""
        if self.mixture:
            return self.mixture
        common = {f.name: getattr(self, f.name) for f in fields(MixtureEntry) if hasattr(self, f.name)}
        return [MixtureEntry(**common)]

    @property
    def title(self) -> str:
        """The datasets in words, for messages."""
        return ", ".join(entry.dataset for entry in self.entries)


@dataclass
class Variation:
    """Describe a further evaluation by its differences from the first.

    Args:
        environment: another one; by default the same.
        task: another instruction than the environment's own.
        embodiment: another robot; by default the same.
    """

    environment: str | None = None
    task: str | None = None
    embodiment: str | None = None


@dataclass
class EvaluationSection:
    """Describe the closed-loop evaluation of the trained policy.

    Args:
        environment: `<family>/<task>`.
        episodes: number of episodes.
        seed: seed of the first episode; keep the seeds apart from those of the demonstrations.
        num_envs: environments that step together.
        horizon: steps after which an episode has failed; the environment's own by default.
        video: film the first episodes; without a renderer the card says why there is no video.
        embodiment: which robot it is, of a policy that learns from several.
        further: more evaluations, over the same seeds.
    """

    environment: str
    episodes: int = 50
    seed: int = 10_000
    num_envs: int = 10
    horizon: int | None = None
    video: bool = False
    embodiment: str | None = None
    further: list[Variation] | None = None

    @property
    def seeds(self) -> range:
        """The seed of every episode."""
        return range(self.seed, self.seed + self.episodes)


@dataclass
class Recipe:
    """Describe a training run from demonstrations to a measured policy.

    Args:
        policy: model type, such as `act_policy`.
        data: the demonstrations.
        base: checkpoint to start from, a folder or Hub id, in our format or another project's; fresh weights without.
        dtype: dtype of the base's weights, such as `bfloat16`; by default as saved.
        quantization: of the base's weights while it is trained with LoRA, `4bit` or `8bit`; none by default.
        output: folder of the checkpoint; it must not exist, or be empty.
        inputs: observation features the policy uses; all of the dataset's by default.
        tokenizer: for policies that read instructions, a folder or Hub id; `words` builds one from the words of the
            dataset's instructions. By default the config names it.
        relative_actions: predict differences to the current state: true for the dimensions that the state has by the
            same name, or per action dimension the state dimension it is relative to, null where it is absolute.
        config: fields of the policy's config.
        training: arguments of `PolicyTrainingArguments`.
        augmentation: variation of the pictures of training batches; none by default.
        evaluation: closed-loop evaluation after the training; none by default.
        plugins: modules that register policies or simulators, imported first.
        name: name of the file, for the card.
    """

    policy: str
    data: DataSection
    output: str
    inputs: list[str] | None = None
    base: str | None = None
    dtype: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    tokenizer: str | None = None
    relative_actions: bool | list[int | None] = False
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    augmentation: Augmentation | None = None
    evaluation: EvaluationSection | None = None
    plugins: list[str] = field(default_factory=list)
    name: str = "recipe"

    def __str__(self) -> str:
        """Return what is set, as YAML."""
        return yaml.safe_dump(_set_values(self), sort_keys=False, width=110, default_flow_style=None)


def _set_values(value: Any) -> Any:
    """Return a value of a recipe as YAML writes it, a section without what is its default."""
    if is_dataclass(value):
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
        return {name: _set_values(v) for name, default in defaults.items() if (v := getattr(value, name)) != default}
    if isinstance(value, Mapping):
        return {name: _set_values(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_set_values(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def available_recipes() -> list[str]:
    """Return the names of the recipes that are shipped."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped().iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | os.PathLike, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file, and apply overrides from the command line.

    Args:
        source: name of a shipped recipe, or a path.
        overrides: (`section.field`, text) pairs, such as `("training.learning_rate", "3e-4")`.

    Raises:
        InvalidRecipeError: no such recipe, no valid YAML, an unknown field, a value of another type.
    """
    shipped = _shipped() / f"{source}.yaml"
    path = shipped if shipped.is_file() else Path(source)
    if not path.is_file():
        raise InvalidRecipeError(f"There is no recipe {str(source)!r}. {nearest(str(source), available_recipes())}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRecipeError(f"{path} should hold `name: value` lines; it holds {type(content).__name__}.")
    for key, text in overrides:
        _set(content, key.split("."), text)
    overridden = [key for key, _ in overrides]
    if "data.dataset" in overridden and not any(key.startswith("data.record") for key in overridden):
        content["data"].pop("record", None)  # a dataset named on the command line exists already
    if "data.dataset" in overridden and not any(key.startswith("data.mixture") for key in overridden):
        content["data"].pop("mixture", None)  # and stands in place of those of the file
    if "data.mixture" in overridden and not any(key.startswith(("data.dataset", "data.record")) for key in overridden):
        for name in ("dataset", "record"):
            content["data"].pop(name, None)
    content.setdefault("name", path.name.removesuffix(".yaml"))
    return _build_recipe(content, str(source))


def _shipped():
    return files(__package__.partition(".")[0] + ".recipes")


def _set(content: dict, keys: list[str], text: str) -> None:
    """Set a value by the names on the way to it; of a list, such as a mixture's datasets, by its number from 0."""
    where = ".".join(keys)
    in_list = False
    for key in keys[:-1]:
        content = _entered(content, key, where)
        in_list = in_list or isinstance(content, list)
    # The text of a field is read as the field's type; values nested in a mapping have none, so YAML decides.
    value = text if len(keys) <= 2 or "record" in keys or in_list else _yaml(text, where)
    if isinstance(content, list):
        content[_number(content, keys[-1], where)] = _yaml(text, where)
    else:
        content[keys[-1]] = value


def _entered(content: dict | list, key: str, where: str) -> dict | list:
    """Return what a name, or the number of a list, leads to."""
    if isinstance(content, list):
        inner = content[_number(content, key, where)]
    else:
        inner = content[key] = content.get(key) or {}
    if not isinstance(inner, (dict, list)):
        raise InvalidRecipeError(f"--{where}: {key!r} is a single value, it has no fields.")
    return inner


def _number(content: list, key: str, where: str) -> int:
    if not key.isdecimal() or int(key) >= len(content):
        raise InvalidRecipeError(f"--{where}: {key!r} is none of the list's entries, 0 … {len(content) - 1}.")
    return int(key)


def _yaml(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise InvalidRecipeError(f"{where}: {text!r} is not valid YAML: {error}") from error


def _build_recipe(content: dict[str, Any], source: str) -> Recipe:
    recipe = _build(Recipe, content, source)
    load_plugins(recipe.plugins)
    # The policy decides which fields the config has, so the config is read last.
    from ..arguments import PolicyTrainingArguments

    config_class = registry.policy_class(recipe.policy).config_class
    recipe.config = _typed(recipe.config, config_class.field_types(), f"{source}: config")
    hints = get_type_hints(PolicyTrainingArguments)
    allowed = {f.name: hints[f.name] for f in fields(PolicyTrainingArguments) if f.init and f.name != "output_dir"}
    recipe.training = _typed(recipe.training, allowed, f"{source}: training")
    return recipe


def _build(cls: type, content: Any, where: str) -> Any:
    """Build a section, and the sections in it."""
    if not isinstance(content, Mapping):
        raise InvalidRecipeError(f"{where} should hold `name: value` lines; it holds {content!r}.")
    hints = get_type_hints(cls)
    plain = {}
    for name, value in content.items():
        section = section_of(hints.get(name))
        if section is not None and isinstance(value, str):  # `--evaluation null`
            value = _yaml(value, f"{where}: {name}")
        if section is not None and isinstance(value, list):
            value = [_build(section, item, f"{where}: {name}") for item in value]
        elif section is not None and value is not None:
            value = _build(section, value, f"{where}: {name}")
        plain[name] = value
    values = _typed(plain, hints, where)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    absent = [name for name in required if name not in values]
    if absent:
        raise InvalidRecipeError(f"{where} lacks {', '.join(absent)}.")
    try:
        return cls(**values)
    except InvalidConfigError as error:
        raise InvalidRecipeError(f"{where}: {str(error).removesuffix('.')}.") from error


def section_of(annotation: Any) -> type | None:
    """Return the dataclass that a field holds, alone or in a list."""
    options = get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
    options = [get_args(option)[0] if get_origin(option) is list else option for option in options]
    return next((option for option in options if hasattr(option, "__dataclass_fields__")), None)


def is_list(annotation: Any) -> bool:
    """Return whether a field holds a list."""
    options = get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
    return any(get_origin(option) is list for option in options)


def _typed(values: Mapping[str, Any], types_of: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read every value as the type of its field: YAML reads "1e-3" as text, and the command line has only text."""
    typed = {}
    for name, value in values.items():
        if name not in types_of:
            raise InvalidRecipeError(f"{where} has no field {name!r}. {nearest(str(name), types_of)}")
        try:
            typed[name] = read_as(value, types_of[name])
        except ValueError as error:
            raise InvalidRecipeError(f"{where}: {name}: {error}.") from error
    return typed
