"""Build what a recipe trains: its dataset, and a policy with its processor for that dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available

from ..auto import AutoPolicy
from ..configuration.features import ACTION, STATE
from ..configuration.policy import PolicyConfig
from ..data.dataset import LeRobotDataset
from ..data.policy_features import PolicyFeatures
from ..data.streaming import StreamingLeRobotDataset
from ..errors import InvalidRecipeError, UnknownDatasetFeatureError
from ..modeling import registry
from ..modeling.parts import PARTS
from ..modeling.policy import PolicyModel
from ..processing.imagenet import IMAGENET_STATISTICS
from ..processing.processor import PolicyProcessor
from ..processing.registry import processor_class
from ..processing.relative_actions import match_dimensions
from ..processing.word_tokenizer import word_tokenizer
from .recipe import DataSection, Recipe
from .relative_statistics import relative_action_statistics


def open_dataset(
    recipe: Recipe, config: PolicyConfig | None = None, features: list[str] | None = None
) -> LeRobotDataset:
    """Open the recipe's demonstrations, recorded first when they do not exist and the recipe says how.

    Without a config, which a base brings, samples hold one step: enough for features and statistics.
    """
    chosen = recipe.data.features if recipe.inputs is None else recipe.inputs
    if features is None and chosen is not None:
        features = list(dict.fromkeys([*chosen, ACTION]))
    record = recipe.data.record
    if record is not None and not Path(recipe.data.dataset).exists():
        from ..evaluation.demonstrations import record_demonstrations

        record_demonstrations(record.environment, record.episodes, recipe.data.dataset, seed=record.seed)
    kind, options = _stream(recipe.data)
    dataset = kind(
        recipe.data.dataset,
        features=features,
        episodes=recipe.data.episodes,
        revision=recipe.data.revision,
        tolerance_s=recipe.data.tolerance_s,
        rename_map=recipe.data.rename_map,
        decoded_cache=recipe.data.decoded_cache,
        **options,
        **({} if config is None else _windows(config)),
    )
    if record is not None and recipe.data.episodes is None and dataset.num_episodes != record.total_episodes:
        raise InvalidRecipeError(
            f"{recipe.data.dataset} exists and holds {dataset.num_episodes} episodes; the recipe records "
            f"{record.total_episodes}. Choose another folder, --data.dataset with --data.record.episodes, or remove "
            f"it."
        )
    return dataset


def _stream(data: DataSection) -> tuple[type[LeRobotDataset], dict[str, Any]]:
    """Return the class of dataset that is asked for, and the arguments that a stream has beside."""
    options = {name: getattr(data, name) for name in ("shuffle_buffer", "cache_gb", "cache_folder")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not data.streaming:
        raise InvalidRecipeError(
            f"data: {', '.join(options)} belong to a stream. Set streaming: true, or leave them out."
        )
    return (StreamingLeRobotDataset, options) if data.streaming else (LeRobotDataset, {})


def _windows(config: PolicyConfig) -> dict[str, int]:
    """Return the arguments of a dataset that say how many steps a sample holds, and which samples there are."""
    return {
        "action_horizon": config.action_horizon,
        "n_obs_steps": config.n_obs_steps,
        "drop_n_last_frames": config.frames_without_start,
    }


def build_policy(recipe: Recipe, dataset: LeRobotDataset) -> tuple[PolicyModel, PolicyProcessor]:
    """Build a policy, fresh or from the recipe's base, and its processor for a dataset's features and statistics."""
    features = _features(recipe, dataset)
    # The robot is the dataset's and none of its cameras is optional, so a base's own robot fields are reset.
    config_class = registry.policy_class(recipe.policy).config_class
    fields = {name: config_class.__dataclass_fields__[name].default for name in config_class.robot_fields}
    fields |= recipe.config | {"input_features": features.inputs, "output_features": features.outputs}
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
    return policy, _build_processor(recipe, dataset, policy.config, features)


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
    recipe: Recipe, dataset: LeRobotDataset, config: PolicyConfig, features: PolicyFeatures
) -> PolicyProcessor:
    """Build the processor of a policy for a dataset's features and statistics."""
    statistics = dict(dataset.statistics)
    if getattr(config, "pretrained_backbone_weights", None):
        # A pretrained backbone expects the pixel statistics it was pretrained with, not those of a few scenes.
        statistics |= {name: statistics.get(name, {}) | IMAGENET_STATISTICS for name in config.image_features}
    relative_to = None
    if recipe.relative_actions is not False:
        relative_to = _relative_to(recipe, dataset)
        vectors = open_dataset(recipe, config, features=[STATE, ACTION])  # no cameras: no video is decoded
        vectors = vectors.random_access() if isinstance(vectors, StreamingLeRobotDataset) else vectors
        statistics[ACTION] = relative_action_statistics(vectors, relative_to)
    language = {"tokenizer": _tokenizer(recipe, dataset)} if config.reads_instruction else {}
    used = (*features.inputs, *features.outputs)
    return processor_class(config).from_config(
        config,
        statistics,
        **language,
        relative_to=relative_to,
        dimension_names={name: dataset.dimension_names[name] for name in used},
        units={name: dataset.units[name] for name in used},
    )


def _features(recipe: Recipe, dataset: LeRobotDataset) -> PolicyFeatures:
    try:
        features = dataset.policy_features
    except UnknownDatasetFeatureError as error:
        raise InvalidRecipeError(f"{recipe.name}: {error}") from error
    if not features.inputs or not features.outputs:
        raise InvalidRecipeError(
            f"{recipe.data.dataset} gives the inputs {list(features.inputs)} and the outputs "
            f"{list(features.outputs)}; a policy needs both. The dataset has: {', '.join(dataset.features)}."
        )
    return features


def _relative_to(recipe: Recipe, dataset: LeRobotDataset) -> list[int | None]:
    if recipe.relative_actions is not True:
        return list(recipe.relative_actions)
    if STATE not in dataset.features:
        raise InvalidRecipeError(f"relative_actions need {STATE!r} among the inputs; they are {recipe.inputs}.")
    widths = tuple(dataset.features[name]["shape"][0] for name in (ACTION, STATE))
    return match_dimensions(dataset.dimension_names[ACTION], dataset.dimension_names[STATE], widths)


def _tokenizer(recipe: Recipe, dataset: LeRobotDataset) -> PreTrainedTokenizerBase | str | None:
    return word_tokenizer(dataset.tasks) if recipe.tokenizer == "words" else recipe.tokenizer
