"""Policies from and as checkpoints: our format, an adapter on a base, another project's layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LOCATION, Checkpoint, resolve, split_publishing
from ..errors import DivergedWeightsError, UnknownPolicyError
from .adapters import attach_saved, has_adapter, save_base_record
from .loading import (
    discard_index,
    load_weights,
    not_finite,
    remove_other_weights,
    removing_stale_records,
)
from .loading_arguments import LOADING_ARGUMENTS, allowed_arguments
from .precision import COMPUTE_TYPES
from .quantization import require_saveable
from .sharding import gathered, is_first_process, is_split


class Checkpointed:
    """Load a policy from a checkpoint and save it as one; a base class of `PolicyModel`, before transformers' own."""

    loaded_from: Checkpoint | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        allow_partial: bool = False,
        base: str | os.PathLike | PreTrainedModel | None = None,
        **kwargs,
    ):
        """Load a policy from a folder or Hub id, in our format or another project's; every weight must fit.

        Args:
            pretrained_model_name_or_path: folder or Hub id, of a policy or of an adapter; None with `config=` and
                `state_dict=`.
            allow_partial: accept missing, unexpected and mis-shaped weights, and log them.
            base: where the base of an adapter is now, or the loaded base; by default where it was when the adapter
                was trained.
            kwargs: config fields to override, and what `PreTrainedModel.from_pretrained` takes. Weights are
                read from safetensors only.

        Raises:
            WeightsMismatchError: weights are missing, unexpected or of another shape.
            MissingFileError, CorruptFileError, ConflictingWeightsError: there is no single readable set of weights.
            BaseMismatchError: an adapter's base is not the one it was trained on.
        """
        kwargs |= {"allow_partial": allow_partial, "base": base}
        return load_policy(cls, pretrained_model_name_or_path, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Let no name through: transformers forgives some that its own models once had, such as `position_ids`."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save config and weights; of a policy with an adapter the adapter, the config and the name of its base.

        Weights that the folder held before are replaced, and records of other weights are removed: it holds one
        policy. With `push_to_hub=True` the folder is published, whole and with our card; then `repo_id`, `private`,
        `revision`, … are those of `push_to_hub`.

        Of several processes the first one writes. Every process has to save a policy that FSDP2 has split.

        Raises:
            DivergedWeightsError: some weights are NaN or infinite; nothing is written.
        """
        if kwargs.get("state_dict") is None and is_split(own := self.state_dict()):
            kwargs["state_dict"] = gathered(own)
            self.save_pretrained(save_directory, *args, **kwargs)
            torch.distributed.barrier()
            return
        if not is_first_process():
            return
        kwargs, publishing = split_publishing(kwargs)
        given = kwargs.get("state_dict")
        if bad := not_finite(self.state_dict() if given is None else given):
            raise DivergedWeightsError(save_directory, bad)
        is_main, variant = kwargs.get("is_main_process", True), kwargs.get("variant")
        require_saveable(self)
        folder = Path(save_directory)
        with removing_stale_records(folder) if is_main else nullcontext():
            if is_main:
                discard_index(folder, variant)
            loaded_dtype = self.config.dtype or self.dtype
            with _without_progress_bars():  # one per checkpoint, across the training's own
                super().save_pretrained(save_directory, *args, **kwargs)
            if is_main:
                self._complete_saved(folder, variant, loaded_dtype)
        if publishing is not None and is_main:
            from ..hub_cards.publish import publish_saved

            publish_saved(self, save_directory, **publishing)

    def _complete_saved(self, folder: Path, variant: str | None, loaded_dtype: torch.dtype) -> None:
        """Note what transformers does not, and remove the weights that the folder held before."""
        dtypes = {parameter.dtype for parameter in self.parameters() if parameter.dtype in COMPUTE_TYPES}
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=self.dtype)
        if getattr(self, "is_quantized", False):  # bitsandbytes casts biases while it computes
            narrowest = loaded_dtype
        if narrowest != self.dtype:  # transformers notes the first parameter's, which may be of a part kept in float32
            self.config.dtype = narrowest
            self.config.save_pretrained(folder)
        if has_adapter(self):
            save_base_record(self, folder)
        remove_other_weights(folder, adapter=has_adapter(self), variant=variant)

    def push_to_hub(self, repo_id: str, *, processor: Any = None, card: str | None = None, **kwargs: Any) -> str:
        """Upload the policy, its processor, records and card in one commit; a card that a person edited is kept.

        Args:
            repo_id: `org/name`.
            processor: the policy's processor, without which a checkpoint cannot run; by default the one in the
                folder that the policy was loaded from.
            card: text of README.md; by default rendered from the config and what is recorded.
            kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr`, `max_shard_size`, `tags`.

        Returns:
            The commit's address.
        """
        # The room of cards stands beside this one; only publishing looks into it.
        from ..hub_cards.publish import publish_policy

        return publish_policy(self, repo_id, processor=processor, card=card, **kwargs)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide transformers' bars inside the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_policy(
    policy_class: type[PreTrainedModel],
    source: str | os.PathLike | Checkpoint | None,
    *args: Any,
    base: Any = None,
    config: PreTrainedConfig | str | os.PathLike | None = None,
    adapter_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Return the policy that a checkpoint holds, in eval mode; see `PolicyModel.from_pretrained`.

    Args:
        policy_class: the class to load, or a base class of it.
        source: folder, Hub id or checkpoint; None with `config=` and `state_dict=`.
        args: further arguments of the policy's constructor.
        base: where an adapter's base is now, or the loaded base.
        config: in place of the checkpoint's. AutoModel passes the one it has read, overrides included.
        adapter_kwargs: where AutoModel found an adapter, before it went on to the adapter's base.
        kwargs: where the checkpoint is, how it is loaded, and config fields to override.
    """
    if source is None:
        name = str(getattr(config, "name_or_path", "") or policy_class.__name__)
        return load_weights(policy_class, None, config, *args, source=name, **kwargs)
    location = {name: kwargs.pop(name) for name in LOCATION if name in kwargs}
    allowed_arguments(kwargs)
    adapter = (adapter_kwargs or {}).get("_adapter_model_path")
    of_base = adapter is not None and str(adapter) != str(source)  # then `config` and `revision` are the base's
    if adapter is not None:
        location["revision"] = adapter_kwargs.get("revision", location.get("revision"))
    checkpoint = resolve(source if adapter is None else adapter, base=base, **location)
    if checkpoint.is_adapter:
        return _load_adapted(policy_class, checkpoint, base, config, of_base, kwargs)
    loading = {name: kwargs.pop(name) for name in list(kwargs) if name in LOADING_ARGUMENTS}
    if checkpoint.layout is not None:
        if config is not None:
            kwargs |= _changes(config, checkpoint.config)
        return _load_published(policy_class, checkpoint, loading, kwargs)
    unused: dict[str, Any] = kwargs
    if not isinstance(config, PreTrainedConfig):
        config, unused = _config(policy_class, checkpoint.config, config, kwargs)
    loading |= {"variant": checkpoint.variant, **unused}
    loaded = load_weights(policy_class, checkpoint.folder, config, *args, source=checkpoint.source, **loading)
    return _remember(loaded, checkpoint)


def _load_published(
    policy_class: type[PreTrainedModel], checkpoint: Checkpoint, loading: dict[str, Any], overrides: dict[str, Any]
) -> Any:
    found = checkpoint.layout.policy_class(checkpoint)
    if not issubclass(found, policy_class):
        raise UnknownPolicyError(
            f"{checkpoint.source} holds weights of {found.__name__}, not of {policy_class.__name__}. "
            f"Use {found.__name__}.from_pretrained, or AutoPolicy.from_pretrained."
        )
    loaded, _ = checkpoint.layout.read(checkpoint, loading=loading, with_processor=False, **overrides)
    return _remember(loaded, checkpoint)


def _load_adapted(
    policy_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    base: Any,
    config: Any,
    of_base: bool,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Load the base that an adapter was trained on, and the adapter into it."""
    wants_info = kwargs.pop("output_loading_info", False)
    if checkpoint.base is None:  # the caller has it
        policy = base
    else:
        if isinstance(config, PreTrainedConfig) and of_base:
            kwargs |= _changes(config, checkpoint.base.config)
            config = None
        loading = {name: kwargs.pop(name) for name in list(kwargs) if name in LOADING_ARGUMENTS}
        if not isinstance(config, PreTrainedConfig):
            config, unused = _config(policy_class, checkpoint.config, config, kwargs, checkpoint.has_config)
            loading |= unused
        if config is not None and "quantization_config" not in checkpoint.base.config:
            # The adapter was trained on a base that was quantised while it was loaded; its files have no fewer bits.
            quantization = vars(config).pop("quantization_config", None)
            loading.setdefault("quantization_config", quantization)
        if checkpoint.base.layout is not None and checkpoint.has_config:
            # The adapter's robot need not be the base's; its dtype is by default the one it was trained in.
            fields = {name: getattr(config, name) for name in config.field_names()}
            if loading.get("dtype") in (None, "auto"):
                loading["dtype"] = checkpoint.config.get("dtype")
            policy = _load_published(policy_class, checkpoint.base, loading, fields)
        elif checkpoint.base.layout is not None:
            policy = _load_published(policy_class, checkpoint.base, loading, kwargs)
        else:
            policy = load_policy(policy_class, checkpoint.base, config=config, **loading)
    attach_saved(policy, checkpoint.folder)
    _remember(policy, checkpoint, is_base=True)
    return (policy, {}) if wants_info else policy


def _config(
    policy_class: type[PreTrainedModel],
    saved: Mapping[str, Any],
    given: str | os.PathLike | None,
    overrides: dict[str, Any],
    readable: bool = True,
) -> tuple[PreTrainedConfig | None, dict[str, Any]]:
    """Return the config of a checkpoint with overrides, and the overrides that name no field."""
    if given is not None:
        return policy_class.config_class.from_pretrained(given, return_unused_kwargs=True, **overrides)
    if not readable:
        return None, overrides
    return policy_class.config_class.from_dict(dict(saved), return_unused_kwargs=True, **overrides)


def _changes(config: PreTrainedConfig, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields in which a config differs from the saved one that it was read from."""
    before = type(config).from_dict(dict(saved))
    names = [name for name in config.field_names() if getattr(config, name) != getattr(before, name)]
    return {name: getattr(config, name) for name in names}


def _remember(loaded: Any, checkpoint: Checkpoint, is_base: bool = False) -> Any:
    """Record on a policy where it comes from."""
    policy = loaded[0] if isinstance(loaded, tuple) else loaded
    policy.loaded_from = checkpoint
    if not is_base:
        policy.config.name_or_path = policy.name_or_path = checkpoint.source
        policy.config._commit_hash = checkpoint.commit
    return loaded
