"""Checkpoint: where a policy, an adapter or another project's checkpoint is, found in one way for every caller.

A source is a folder or a Hub id, with `subfolder`, `revision` and the like. It becomes a folder of local files and the
parsed config.json; of a Hub repository only the files of that checkpoint are downloaded. Layouts of other projects
register here, so that the rooms below `conversion` can read them without importing it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ._files import read_json
from .errors import CheckpointError, InvalidConfigError, MissingFileError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE)
CONFIG_FILE = "config.json"
# What a folder records of the policy whose weights it holds.
RECORDS = ("training.json", "evaluation.json", "learning_curve.png", "rollout.mp4")
# Arguments that say where a checkpoint is.
LOCATION = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "variant")
# Arguments of `save_pretrained(push_to_hub=True)` that say how it is published.
PUBLISHING = (
    *("repo_id", "private", "token", "revision", "create_pr"),
    *("commit_message", "commit_description", "tags"),
)
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "token")
# Files at the top of a checkpoint, as patterns; weights are downloaded once the small files are known.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass(frozen=True)
class Layout:
    """How another project lays out its checkpoints.

    Args:
        name: of the project, for messages.
        matches: whether a parsed config.json is written in this layout.
        policy_class: the class of policy that a checkpoint of it holds.
        read: `(checkpoint, *, loading, processor_fields, tokenizer, with_processor, **overrides)` → policy and
            processor; see `conversion.published_policy`.
        files: folder of the small files → patterns of what is downloaded beside them and the weights.
        arguments: names of arguments of `read` that only this layout has.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    policy_class: Callable[[Checkpoint], type]
    read: Callable[..., tuple[Any, Any]]
    files: Callable[[Path], Sequence[str]] | None = None
    arguments: tuple[str, ...] = ()


_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known to every door; a layout of the same name is replaced."""
    _LAYOUTS[layout.name] = layout
    return layout


def find_layout(config: Mapping[str, Any]) -> Layout | None:
    """Return the layout that a parsed config.json is written in; None when it is ours."""
    return next((layout for layout in _LAYOUTS.values() if layout.matches(config)), None)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this machine.

    Args:
        source: what the caller asked for: folder or Hub id.
        folder: the local folder of its files.
        config: the parsed config.json; that of its base for an adapter that has none of its own.
        layout: another project's; None for ours.
        is_adapter: whether it holds an adapter.
        base: what the adapter was trained on; None for a whole policy, or when the caller has it already.
        commit: of the Hub repository; None for a folder.
        subfolder: of the repository or folder.
        variant: of the weight files, such as `fp16`.
    """

    source: str
    folder: Path
    config: dict[str, Any] = field(repr=False)
    layout: Layout | None = None
    is_adapter: bool = False
    base: Checkpoint | None = None
    commit: str | None = None
    subfolder: str = ""
    variant: str | None = None

    @property
    def has_config(self) -> bool:
        """Whether the folder has a config.json of its own."""
        return (self.folder / CONFIG_FILE).is_file()


def resolve(source: str | os.PathLike | Checkpoint, base: Any = None, **location: Any) -> Checkpoint:
    """Find a checkpoint, and download its files where `source` is a Hub id.

    Args:
        source: folder or Hub id; a `Checkpoint` is returned as it is.
        base: of an adapter, where its base is now; an object that is no path is the base itself.
        location: `revision`, `subfolder`, `variant`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        MissingFileError: there is no such folder or repository, or it holds no checkpoint.
        CorruptFileError: its config.json cannot be read.
        CheckpointError: its config.json asks for code, or for weights of another name.
    """
    if isinstance(source, Checkpoint):
        return source
    folder, commit = find_folder(source, **location)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    given = base is not None and not isinstance(base, (str, os.PathLike))
    found = None
    if is_adapter and not given:
        found = _base(folder, str(source), base, location)
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
    elif is_adapter:  # as peft itself saves one
        config = base.config.to_dict() if given else found.config
    else:
        raise MissingFileError(f"{source} holds no {CONFIG_FILE}, so it is no checkpoint; it holds {listing(folder)}.")
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"The {CONFIG_FILE} of {source} names other weights than its own, transformers_weights="
            f"{config['transformers_weights']!r}, which is refused. Remove the line."
        )
    refuse_code(config, str(source))
    layout = None if is_adapter else find_layout(config)
    if commit is not None:
        variant = location.get("variant")
        files = [name.replace("model", f"model.{variant}", 1) if variant else name for name in WEIGHT_FILES]
        _download(str(source), (*files, ADAPTER_WEIGHTS), location | {"revision": commit})
        if layout is not None and layout.files and (more := layout.files(folder)):
            _download(str(source), more, location | {"revision": commit})
    subfolder = location.get("subfolder") or ""
    name = str(source) if commit else str(Path(source, subfolder))
    return Checkpoint(name, folder, config, layout, is_adapter, found, commit, subfolder, location.get("variant"))


def find_folder(source: str | os.PathLike, **location: Any) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint and the commit of its repository; its small files are downloaded.

    Raises:
        MissingFileError: there is no such folder or repository.
    """
    unknown = location.keys() - set(LOCATION)
    if unknown:
        raise InvalidConfigError(f"{', '.join(sorted(unknown))}: not among {', '.join(LOCATION)}.")
    subfolder = location.get("subfolder") or ""
    commit = None
    if os.path.isdir(source):
        top = Path(source)
    else:
        top = _download(str(source), SMALL_FILES, location)
        commit = top.name  # the Hub's cache names a snapshot after its commit
    folder = top / subfolder
    if not folder.is_dir():
        if subfolder:
            raise MissingFileError(f"{source} has no subfolder {subfolder!r}; it holds {listing(top)}.")
        raise MissingFileError(f"{source} holds no {CONFIG_FILE}, so it is no checkpoint; it holds nothing.")
    return folder, commit


def _download(source: str, patterns: Sequence[str], location: Mapping[str, Any]) -> Path:
    """Download files of a repository that fit patterns; one with a slash reaches into deeper folders."""
    subfolder = str(location.get("subfolder") or "").strip("/")
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    arguments = {name: location[name] for name in _DOWNLOAD if location.get(name) is not None}
    revision = location.get("revision")
    try:
        top = snapshot_download(
            source,
            # transformers passes one that remembers a commit, which for an adapter is its base's.
            revision=None if revision is None else str(revision),
            allow_patterns=[prefix + pattern for pattern in patterns],
            ignore_patterns=None if any("/" in pattern for pattern in patterns) else [f"{prefix}*/*"],
            **arguments,
        )
    except (OSError, ValueError) as error:
        raise MissingFileError(f"{source} is neither a folder nor a readable Hub repository: {error}") from error
    return Path(top)


def base_of(folder: Path) -> tuple[str, dict[str, str]]:
    """Return where the base of an adapter was when the adapter was trained, and its commit and subfolder.

    Raises:
        CheckpointError: its folder does not say.
    """
    record = read_json(folder / ADAPTER_BASE) if (folder / ADAPTER_BASE).is_file() else {}
    config = read_json(folder / ADAPTER_CONFIG)
    base = record.get("base") or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder} does not say which base its adapter belongs to. Pass base=folder_or_id.")
    found = {"revision": record.get("revision") or config.get("revision"), "subfolder": record.get("subfolder")}
    return str(base), {name: value for name, value in found.items() if value}


def _base(folder: Path, source: str, base: Any, location: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint that the adapter in a folder needs."""
    where, place = (str(base), {}) if base else base_of(folder)
    own = {name: location[name] for name in _DOWNLOAD if name in location}
    try:
        return resolve(where, **own, **place)
    except MissingFileError as error:
        raise MissingFileError(
            f"The adapter in {source} needs its base {where!r}: {error} If it is elsewhere: base=folder_or_id."
        ) from error


def refuse_code(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config that names an attention kernel in a repository, at whatever depth: that would download code.

    Raises:
        CheckpointError: it does.
    """
    for name, value in config.items():
        if name in _ATTENTION:
            for chosen in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(chosen, str) and "/" in chosen:
                    raise CheckpointError(
                        f"{source}: {name}={chosen!r} would download code from a repository, which is never done. "
                        f"Choose 'sdpa' or 'eager'."
                    )
        elif isinstance(value, Mapping):
            refuse_code(value, source)


def split_publishing(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what `save_pretrained` itself takes, and the options of publishing; None where it is not asked for."""
    rest = {name: value for name, value in kwargs.items() if name != "push_to_hub"}
    if not kwargs.get("push_to_hub"):
        return rest, None
    options = {name: rest.pop(name) for name in list(rest) if name in PUBLISHING}
    return rest, options


def listing(folder: Path) -> str:
    """Return the names of what a folder holds, for messages."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names) or "nothing"
