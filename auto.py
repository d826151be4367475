"""AutoPolicy: read config.json, find the policy, load it strictly."""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoProcessor
from transformers.utils import cached_file

from ._files import read_json
from .configuration.policy import PolicyConfig
from .conversion import published_layout, read_published
from .errors import CheckpointError, MissingFileError, UnknownPolicyError
from .modeling import registry
from .modeling.adapters import ADAPTER_CONFIG, base_of, commit_of, find_adapter
from .modeling.policies import act, diffusion, gr00t_n1, gr00t_n1_5, pi0  # noqa: F401  (importing one registers it)
from .modeling.policy import PolicyModel
from .processing import gr00t as _gr00t  # noqa: F401  (as does importing a processor)
from .processing import pi0 as _pi0  # noqa: F401
from .processing.processor import PolicyProcessor
from .processing.registry import processor_class

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class AutoPolicy:
    """Load any policy by what its config.json says; see `from_pretrained`."""

    def __init__(self):
        raise CheckpointError("AutoPolicy is not built: use AutoPolicy.from_pretrained or AutoPolicy.from_config.")

    @staticmethod
    def from_pretrained(source: str | os.PathLike, **kwargs: Any) -> PolicyModel:
        """Load a policy from a folder or Hub id, in our format or as another project published it.

        Args:
            source: folder or Hub id, of a policy or of a LoRA adapter.
            kwargs: `dtype`, `device_map`, `allow_partial`, `revision`, `token`, `local_files_only`, …, config fields
                to override, and for an adapter `base`, where its base is now.

        Returns:
            The policy, in eval mode.

        Raises:
            UnknownPolicyError: no policy of that type.
            WeightsMismatchError: weights are missing, unexpected or of another shape.
        """
        config = read_config_json(source, **kwargs)
        if published_layout(config) is not None:
            return load_published_checkpoint(source, config, with_processor=False, **kwargs)[0]
        return _load_ours(source, config, **kwargs)

    @staticmethod
    def from_config(config: PolicyConfig, **kwargs: Any) -> PolicyModel:
        """Build a policy with fresh weights."""
        return registry.policy_class(config.model_type)(config, **kwargs)


def load_policy_and_processor(
    source: str | os.PathLike, tokenizer: Any = None, embodiment: str | None = None, **kwargs: Any
) -> tuple[PolicyModel, PolicyProcessor]:
    """Load a policy and the processor saved with it; other arguments as `AutoPolicy.from_pretrained`.

    Args:
        source: folder or Hub id.
        tokenizer: of a published policy that reads instructions, where its own cannot be had: a tokenizer, or a
            folder or Hub id that holds one. Our checkpoints hold theirs.
        embodiment: which robot it is for, where a checkpoint knows several.

    Raises:
        CheckpointError: the processor feeds another policy than the one beside it.
        EmbodimentError: it knows no such robot.
    """
    config = read_config_json(source, **kwargs)
    reader = published_layout(config)
    if reader is not None:
        if embodiment is not None and "embodiment" in inspect.signature(reader).parameters:
            kwargs["embodiment"] = embodiment  # robots of different widths: the policy must know too
        policy, processor = load_published_checkpoint(source, config, tokenizer=tokenizer, **kwargs)
    else:
        policy = _load_ours(source, config, **kwargs)
        processor = processor_class(policy.config).from_pretrained(source, **_hub_arguments(kwargs))
        processor.check_agreement(policy.config)
    if embodiment is not None:
        processor.choose_embodiment(embodiment)
    return policy, processor


def _load_ours(source: str | os.PathLike, config: dict[str, Any], **kwargs: Any) -> PolicyModel:
    """Load a policy in our format, or an adapter, whose base may be in another project's."""
    policy_class = _class_for(config, source)
    adapter = find_adapter(source, kwargs)
    if adapter is not None and not isinstance(kwargs.get("base"), PolicyModel):
        base, revision = (kwargs["base"], None) if kwargs.get("base") else base_of(adapter)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs} | {"revision": revision}
        base_config: dict[str, Any] = {}
        with suppress(MissingFileError):  # whoever loads the adapter says it better
            base_config = read_config_json(base, **hub)
        if published_layout(base_config) is not None:
            adapted = policy_class.config_class.from_dict(config)  # the adapter's robot need not be the base's
            fields = {name: getattr(adapted, name) for name in adapted.field_names()}
            if dtype := kwargs.pop("dtype", config.get("dtype")):  # by default as it was when the adapter was trained
                fields["dtype"] = dtype
            kwargs["base"], _ = load_published_checkpoint(base, base_config, with_processor=False, **hub | fields)
            kwargs["base"].config._name_or_path = str(base)
    return policy_class.from_pretrained(source, **kwargs)


def load_published_checkpoint(
    source: str | os.PathLike, config: dict[str, Any], **kwargs: Any
) -> tuple[PolicyModel, PolicyProcessor | None]:
    """Load another project's checkpoint from a folder or Hub id."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"], **_hub_arguments(kwargs)
            )
        )
    overrides = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
    policy, processor = read_published(folder, config, source=str(source), **overrides)
    policy.config._commit_hash = commit_of(source, **_hub_arguments(kwargs))
    return policy, processor


def read_config_json(source: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    """Return the parsed config.json of a folder or Hub id.

    Raises:
        MissingFileError, CorruptFileError: it is absent, or not JSON.
    """
    if Path(source).is_dir():
        path = Path(source) / "config.json"
        if not path.is_file() and (adapter := Path(source, ADAPTER_CONFIG)).is_file():  # as peft itself saves one
            base = kwargs.pop("base", None) or read_json(adapter).get("base_model_name_or_path")
            return read_config_json(base, **kwargs)
        if not path.is_file():
            held = ", ".join(sorted(p.name for p in Path(source).iterdir())) or "nothing"
            raise MissingFileError(f"{source} holds no config.json, so it is no checkpoint; it holds {held}.")
    else:
        try:
            found = cached_file(str(source), "config.json", **_hub_arguments(kwargs))
        except OSError as error:
            raise MissingFileError(f"{source} is neither a folder nor a readable Hub repository: {error}") from error
        if found is None:
            raise MissingFileError(f"The repository {source} holds no config.json, so it is no checkpoint.")
        path = Path(found)
    return read_json(path)


def _class_for(config: dict[str, Any], source: str | os.PathLike) -> type[PolicyModel]:
    if not isinstance(config.get("model_type"), str):
        raise UnknownPolicyError(f"The config.json of {source} names no model_type, so no policy can be chosen.")
    return registry.policy_class(config["model_type"])


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def register_processors() -> None:
    """Make every registered policy's processor known to AutoProcessor; a name that is taken is skipped."""
    for policy_class in registry.registered_policies().values():
        with suppress(ValueError):
            AutoProcessor.register(policy_class.config_class, processor_class(policy_class.config_class))


register_processors()
