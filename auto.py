"""AutoPolicy: read config.json, find the policy, load it strictly, with the processor that feeds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from . import conversion  # noqa: F401  (importing it registers the layouts of other projects)
from ._files import read_json
from .checkpoint import LOCATION, Checkpoint, resolve
from .configuration.features import ACTION, IMAGE_PREFIX, STATE, is_camera_name
from .configuration.policy import PolicyConfig
from .conversion.layouts.openpi import read_norm_stats
from .errors import CheckpointError, InvalidConfigError, UnknownConfigFieldError, UnknownPolicyError, nearest
from .families import FAMILIES
from .modeling import registry
from .modeling.loading_arguments import LOADING_ARGUMENTS, REFUSED_ARGUMENTS, allowed_arguments
from .modeling.policy import PolicyModel
from .processing.processor import PolicyProcessor
from .processing.registry import processor_class, register_processor


class AutoPolicy:
    """Load any policy by what its config.json says; see `from_pretrained`."""

    def __init__(self):
        raise CheckpointError("AutoPolicy is not built: use AutoPolicy.from_pretrained or AutoPolicy.from_config.")

    @staticmethod
    def from_pretrained(source: str | os.PathLike, **kwargs: Any) -> PolicyModel:
        """Load a policy from a folder or Hub id, in our format or as another project published it.

        Args:
            source: folder or Hub id, of a policy or of a LoRA adapter.
            kwargs: `dtype`, `device_map`, `allow_partial`, `subfolder`, `revision`, `variant`, `token`,
                `local_files_only`, …, config fields to override, and for an adapter `base`, where its base is now.

        Returns:
            The policy, in eval mode.

        Raises:
            UnknownPolicyError: no policy of that type.
            WeightsMismatchError: weights are missing, unexpected or of another shape.
        """
        checkpoint, kwargs = _resolve(source, kwargs)
        return _policy_class(checkpoint).from_pretrained(checkpoint, **kwargs)

    @staticmethod
    def from_config(config: PolicyConfig, **kwargs: Any) -> PolicyModel:
        """Build a policy with fresh weights."""
        return registry.policy_class(config.model_type)(config, **kwargs)


def load_policy_and_processor(
    source: str | os.PathLike,
    tokenizer: Any = None,
    embodiment: str | None = None,
    camera_map: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> tuple[PolicyModel, PolicyProcessor]:
    """Load a policy and the processor saved with it; other arguments as `AutoPolicy.from_pretrained`.

    Args:
        source: folder or Hub id.
        tokenizer: of a policy that reads instructions, in place of its own: a tokenizer, or a folder or Hub id that
            holds one. Published checkpoints may name one that is gated.
        embodiment: which robot it is for, where a checkpoint knows several.
        camera_map: your camera's name → the policy's, with or without `observation.images.`; one such as
            `observation.rgb` is a whole name.
        kwargs: config fields and processor fields, such as `relative_to` and `rename_map`, to override. A mapping that
            is overridden in part keeps the rest of what is saved. `statistics` may also be a dataset, folder or Hub
            id, or a JSON file such as a dataset's meta/stats.json or openpi's norm_stats.json.

    Raises:
        CheckpointError: the processor feeds another policy than the one beside it.
        EmbodimentError: it knows no such robot.
        UnknownConfigFieldError: an argument is none of these.
    """
    checkpoint, kwargs = _resolve(source, kwargs)
    policy_class = _policy_class(checkpoint)
    fields = _processor_fields(policy_class, kwargs)
    layout = checkpoint.layout
    own = layout.arguments if layout is not None else ()
    _refuse_unknown(policy_class, kwargs, own)
    if layout is not None:
        loading = {name: kwargs.pop(name) for name in list(kwargs) if name in LOADING_ARGUMENTS}
        kwargs |= {"embodiment": embodiment} if "embodiment" in own else {}
        policy, processor = layout.read(
            checkpoint, loading=allowed_arguments(loading), processor_fields=fields, tokenizer=tokenizer, **kwargs
        )
        policy.loaded_from, policy.config._commit_hash = checkpoint, checkpoint.commit
    else:
        policy = policy_class.from_pretrained(checkpoint, **kwargs)
        kind = processor_class(policy.config)
        fields |= {name: getattr(policy.config, name) for name in kwargs if name in kind.field_names()}
        fields |= {} if tokenizer is None else {"tokenizer": tokenizer}
        processor = kind.from_pretrained(checkpoint, **fields)
    return policy, _for_robot(policy, processor, embodiment, camera_map)


def load_processor(
    policy: PolicyModel,
    tokenizer: Any = None,
    embodiment: str | None = None,
    camera_map: Mapping[str, str] | None = None,
) -> PolicyProcessor:
    """Load the processor saved with a policy that is loaded already; arguments as in `load_policy_and_processor`.

    Raises:
        CheckpointError: the processor feeds another policy.
    """
    checkpoint = policy.loaded_from
    own = checkpoint.layout.arguments if checkpoint.layout is not None else ()
    options = {"embodiment": embodiment} if embodiment is not None and "embodiment" in own else {}
    options |= {} if tokenizer is None else {"tokenizer": tokenizer}
    processor = processor_class(policy.config).from_pretrained(checkpoint, **options)
    return _for_robot(policy, processor, embodiment, camera_map)


def _for_robot(
    policy: PolicyModel, processor: PolicyProcessor, embodiment: str | None, camera_map: Mapping[str, str] | None
) -> PolicyProcessor:
    """Return the processor for one of the robots it knows, under the names of that robot's cameras."""
    processor.check_agreement(policy.config)
    if embodiment is not None:
        processor.choose_embodiment(embodiment)
    if camera_map:
        processor.rename_map = processor.rename_map | _camera_names(camera_map, policy.config.image_features)
    return processor


def _resolve(source: str | os.PathLike, kwargs: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint of a source, and the arguments that do not say where it is."""
    location = {name: value for name, value in kwargs.items() if name in LOCATION}
    rest = {name: value for name, value in kwargs.items() if name not in LOCATION and name != "code_revision"}
    checkpoint = resolve(source, base=rest.get("base"), **location)
    if not checkpoint.is_adapter and rest.pop("base", None) is not None:
        raise InvalidConfigError(f"base= is for adapters, and {source} holds none.")
    return checkpoint, rest


def _policy_class(checkpoint: Checkpoint) -> type[PolicyModel]:
    if checkpoint.layout is None and checkpoint.base is not None and not checkpoint.has_config:
        checkpoint = checkpoint.base  # as peft itself saves an adapter
    if checkpoint.layout is not None:
        return checkpoint.layout.policy_class(checkpoint)
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise UnknownPolicyError(
            f"The config.json of {checkpoint.source} names no model_type, so no policy can be chosen."
        )
    return registry.policy_class(model_type)


def _processor_fields(policy_class: type[PolicyModel], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the fields out of the arguments that the processor has and the policy's config has not."""
    config_class = policy_class.config_class
    names = set(processor_class(config_class).field_names()) - set(config_class.field_names())
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if isinstance(fields.get("statistics"), (str, os.PathLike)):
        fields["statistics"] = _read_statistics(fields["statistics"])
    return fields


def _read_statistics(source: str | os.PathLike) -> Mapping[str, Any]:
    """Return the statistics of a dataset, or those in a JSON file such as its meta/stats.json or a norm_stats.json."""
    if not Path(source).is_file():
        from .data.dataset import LeRobotDataset  # needs more than loading a policy does

        return LeRobotDataset(source, features=[STATE, ACTION]).statistics
    content = read_json(source)
    return read_norm_stats(Path(source)) if "norm_stats" in content else content


def _refuse_unknown(policy_class: type[PolicyModel], kwargs: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Check that every argument is one of loading, of the config or of the processor."""
    config_class = policy_class.config_class
    known = {*LOADING_ARGUMENTS, *REFUSED_ARGUMENTS, *config_class.field_names(), *own, "base"}
    for name in kwargs:
        if name not in known and not name.startswith("_") and not hasattr(config_class, name):
            listed = {*config_class.field_names(), *processor_class(config_class).field_names(), *own, *LOCATION}
            listed |= {"dtype", "device_map", "allow_partial", "tokenizer", "embodiment", "camera_map", "base"}
            raise UnknownConfigFieldError(config_class.__name__, name, listed)


def _camera_names(camera_map: Mapping[str, str], cameras: Mapping[str, Any]) -> dict[str, str]:
    """Return a camera map under the full names of features."""
    renamed = {}
    for yours, theirs in camera_map.items():
        # `observation.rgb` is a whole name, too: some datasets call their cameras so.
        full = {
            n: n if is_camera_name(n) or n.startswith("observation.") else IMAGE_PREFIX + n for n in (yours, theirs)
        }
        if full[theirs] not in cameras:
            raise InvalidConfigError(
                f"camera_map names the policy's camera {theirs!r}. {nearest(full[theirs], cameras)}"
            )
        renamed[full[yours]] = full[theirs]
    return renamed


def _know_processor(policy_class: type[PolicyModel], processor: type[PolicyProcessor] | None) -> None:
    """Make a policy's processor known here and to AutoProcessor; a name that is taken is left to its owner."""
    config_class = policy_class.config_class
    if processor is not None:
        register_processor(config_class.model_type, processor)
    with suppress(ValueError):
        AutoProcessor.register(config_class, processor_class(config_class), exist_ok=processor is not None)


registry.when_registered(_know_processor)
for _known in registry.registered_policies().values():  # `conversion` has imported some
    _know_processor(_known, None)
for _family in FAMILIES.values():  # importing a policy registers it
    import_module(f".{_family.policy.split(':')[0]}", __package__)
