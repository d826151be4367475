"""Build what a recipe trains: a policy with its processor, for the recipe's dataset."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available, logging

from ...auto import AutoPolicy
from ...checkpoint import resolve
from ...configuration.features import ACTION, STATE
from ...configuration.policy import PolicyConfig
from ...data.dataset import LeRobotDataset
from ...data.mixture import MixtureDataset
from ...data.policy_features import PolicyFeatures
from ...data.streaming.dataset import StreamingLeRobotDataset
from ...errors import InvalidRecipeError, UnknownDatasetFeatureError
from ...modeling import registry
from ...modeling.parts import PARTS
from ...modeling.policy import PolicyModel
from ...processing.imagenet import IMAGENET_STATISTICS
from ...processing.processor import PolicyProcessor
from ...processing.registry import processor_class
from ...processing.relative_actions import match_dimensions
from ...processing.word_tokenizer import word_tokenizer
from .opening import Demonstrations, open_dataset
from .recipe import Recipe
from .relative_statistics import relative_action_statistics

logger = logging.get_logger(__name__)


def build_policy(recipe: Recipe, dataset: Demonstrations) -> tuple[PolicyModel, PolicyProcessor]:
    """Build a policy, fresh or from the recipe's base, and its processor for a dataset's features and statistics."""
    features = _features(recipe, dataset)
    # The robot is the dataset's and none of its cameras is optional, so a base's own robot fields are reset.
    config_class = registry.policy_class(recipe.policy).config_class
    defaults = {name: config_class.__dataclass_fields__[name].default for name in config_class.robot_fields}
    fields = defaults | recipe.config | {"input_features": features.inputs, "output_features": features.outputs}
    if isinstance(dataset, MixtureDataset):
        given = {name: value for name, value in fields.items() if name in recipe.config or name not in defaults}
        if recipe.base is not None and (slots := resolve(recipe.base).config.get("embodiment_ids")):
            given.setdefault("embodiment_ids", slots)  # so that a new robot does not take an old one's slot
        fields |= dataset.config_fields(config_class, given)
    if recipe.base is None:
        if recipe.dtype is not None:
            raise InvalidRecipeError(f"dtype={recipe.dtype} is that of a base; fresh weights are trained in float32.")
        if recipe.quantization is not None:
            raise InvalidRecipeError(f"quantization={recipe.quantization} is that of a base; name one.")
        policy = AutoPolicy.from_config(config_class(**fields))
    else:
        loading = {"dtype": recipe.dtype, "quantization_config": _quantization(recipe)}
        loading = {name: value for name, value in loading.items() if value is not None}
        policy = AutoPolicy.from_pretrained(recipe.base, **fields, **loading)
        if policy.config.model_type != recipe.policy:
            raise InvalidRecipeError(
                f"{recipe.base} is a {policy.config.model_type}; the recipe is for {recipe.policy}."
            )
    if isinstance(dataset, MixtureDataset):
        _require_fit(dataset, policy)
    return policy, _build_processor(recipe, dataset, policy.config, features)


def _require_fit(dataset: MixtureDataset, policy: PolicyModel) -> None:
    """Check that a policy can learn from all datasets of a mixture, and say which cameras some of them lack."""
    dataset.require_fit(policy.config)
    for camera in policy.config.optional_cameras:
        lacking = [name for name, d in zip(dataset.names, dataset.datasets, strict=True) if camera not in d.features]
        if lacking and "pixel_mask" not in inspect.signature(policy.forward).parameters:
            raise InvalidRecipeError(
                f"{', '.join(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} {camera}, and "
                f"{type(policy).__name__} cannot do without a camera: its forward takes no pixel_mask. Leave it "
                f"out: --inputs"
            )
        if lacking:
            logger.warning(
                f"{camera} is optional: {', '.join(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} it."
            )


def _quantization(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return how the base's weights are quantised; 4 bits as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""
    if recipe.quantization is None:
        return None
    if not is_bitsandbytes_available():
        raise InvalidRecipeError(
            f"quantization={recipe.quantization} needs bitsandbytes: pip install 'manipulators[quantization]'."
        )
    if "lora" not in [recipe.training.get(part) for part in PARTS]:
        raise InvalidRecipeError(
            f"quantization={recipe.quantization}: quantised weights cannot be trained themselves. Train an adapter on "
            f"them, such as --training.tune_llm lora, or leave quantization out."
        )
    if recipe.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=recipe.dtype or "float32",
    )


def _build_processor(
    recipe: Recipe, dataset: Demonstrations, config: PolicyConfig, features: PolicyFeatures
) -> PolicyProcessor:
    """Build the processor of a policy for a dataset's features and statistics."""
    used = (*features.inputs, *features.outputs)
    if isinstance(dataset, MixtureDataset):
        fields = dataset.processor_fields(config)
    else:
        fields = {
            "statistics": dataset.statistics,
            "dimension_names": {name: dataset.dimension_names[name] for name in used},
            "units": {name: dataset.units[name] for name in used},
        }
    relative_to = None if recipe.relative_actions is False else _relative_to(recipe, dataset)
    # No cameras: no video is decoded.
    vectors = [] if relative_to is None else _parts(open_dataset(recipe, config, features=[STATE, ACTION]))
    vectors = [(d.random_access() if isinstance(d, StreamingLeRobotDataset) else d, robot) for d, robot in vectors]

    def completed(statistics: Mapping[str, Any], robot: str | None = None) -> dict[str, Any]:
        statistics = dict(statistics)
        if getattr(config, "pretrained_backbone_weights", None):
            # A pretrained backbone expects the pixel statistics it was pretrained with, not those of a few scenes.
            statistics |= {name: statistics.get(name, {}) | IMAGENET_STATISTICS for name in config.image_features}
        if relative_to is not None:
            own = [d for d, of in vectors if robot is None or of == robot]
            statistics[ACTION] = relative_action_statistics(own, relative_to)
        return statistics

    if "embodiments" in fields:
        fields["embodiments"] = {robot: completed(own, robot) for robot, own in fields["embodiments"].items()}
    else:
        fields["statistics"] = completed(fields["statistics"])
    language = {"tokenizer": _tokenizer(recipe, dataset, config)} if config.reads_instruction else {}
    return processor_class(config).from_config(config, **language, relative_to=relative_to, **fields)


def _parts(dataset: Demonstrations) -> list[tuple[LeRobotDataset, str | None]]:
    """Return the datasets that a dataset consists of, each with its robot."""
    if isinstance(dataset, MixtureDataset):
        return list(zip(dataset.datasets, dataset.embodiments, strict=True))
    return [(dataset, None)]


def _features(recipe: Recipe, dataset: Demonstrations) -> PolicyFeatures:
    try:
        features = dataset.policy_features
    except UnknownDatasetFeatureError as error:
        raise InvalidRecipeError(f"{recipe.name}: {error}") from error
    if not features.inputs or not features.outputs:
        raise InvalidRecipeError(
            f"{recipe.data.title} gives the inputs {list(features.inputs)} and the outputs "
            f"{list(features.outputs)}; a policy needs both. The dataset has: {', '.join(dataset.features)}."
        )
    return features


def _relative_to(recipe: Recipe, dataset: Demonstrations) -> list[int | None]:
    """Return which dimension of the state each of the action is relative to: one answer for all datasets.

    Raises:
        InvalidRecipeError: there is no state, or the datasets of a mixture have different answers.
    """
    if recipe.relative_actions is not True:
        return list(recipe.relative_actions)
    if STATE not in dataset.features:
        raise InvalidRecipeError(f"relative_actions need {STATE!r} among the inputs; they are {recipe.inputs}.")
    found = {}
    for part, _ in _parts(dataset):
        widths = tuple(part.features[name]["shape"][0] for name in (ACTION, STATE))
        names = (part.dimension_names[ACTION], part.dimension_names[STATE])
        found[part.root.name] = match_dimensions(*names, widths)
    if len({tuple(answer) for answer in found.values()}) > 1:
        raise InvalidRecipeError(
            f"relative_actions: the datasets' dimensions match differently: {found}. One policy has one rule: say it, "
            f"such as [0, 1, 2, null], or train on absolute actions."
        )
    return next(iter(found.values()))


def _tokenizer(recipe: Recipe, dataset: Demonstrations, config: PolicyConfig) -> PreTrainedTokenizerBase | str | None:
    if recipe.tokenizer != "words":
        return recipe.tokenizer
    return word_tokenizer([*dataset.tasks, *processor_class(config).instruction_class.written_words])
