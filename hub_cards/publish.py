"""Publish a checkpoint folder or a dataset: one commit, our card, and nothing left that contradicts it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from .._files import read_json, write_text
from ..checkpoint import ADAPTER_CONFIG, ADAPTER_FILES, CONFIG_FILE, RECORDS, base_of
from ..errors import ManipulatorsError, MissingFileError, PublishingError
from .card import CARD_FILE, LEARNING_CURVE_FILE, card_with_tags, save_card
from .checkpoint_card import EVALUATION_FILE, TRAINING_FILE, checkpoint_card
from .dataset_card import INFO_FILE, dataset_card
from .edits import keep_edited, was_edited
from .eval_results import EVAL_RESULTS_FILE, eval_results
from .licenses import license_fields, license_of_card
from .wording import is_hub_id, public_name, without_local_paths

logger = logging.get_logger(__name__)

PROCESSOR_FILE = "processor_config.json"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", *ADAPTER_FILES)
_PROCESSOR = (PROCESSOR_FILE, "tokenizer*", "*.model", "*.jinja", "vocab.*", "merges.txt", "*_tokens*.json")
# What is published of a checkpoint folder: neither Trainer's states nor checkpoints inside it.
_PUBLISHED = (CONFIG_FILE, *_WEIGHTS, *_PROCESSOR, *RECORDS, "*.mp4", CARD_FILE, "LICENSE*", "NOTICE*")
# Deleted from the repository unless they are uploaded again: a repository holds one checkpoint.
_STALE = [*_WEIGHTS, *RECORDS, EVAL_RESULTS_FILE, "pytorch_model*", "policy_p*processor*", "training_args.bin"]
_DATASET = ("meta/*", "data/*", "videos/*", "images/*")


def publish_folder(
    folder: str | os.PathLike,
    repo_id: str,
    base: str | os.PathLike | None = None,
    beside: Mapping[str, str | os.PathLike] | None = None,
    **options: Any,
) -> str:
    """Upload a checkpoint folder of a policy or an adapter in one commit; return the commit's address.

    Args:
        folder: with config.json and weights; processor, records and card where there are some.
        repo_id: `org/name`; created when it does not exist.
        base: folder or Hub id of the checkpoint that the weights derive from, where no file says it.
        beside: name in the repository → another folder that is uploaded with it, whole.
        options: see `Prepared.publish`.

    Raises:
        MissingFileError: the folder is no checkpoint.
        PublishingError: the Hub refuses.
    """
    return prepare_folder(folder, beside, base).publish(repo_id, **options)


def prepare_folder(
    folder: str | os.PathLike,
    beside: Mapping[str, str | os.PathLike] | None = None,
    base: str | os.PathLike | None = None,
    near: str | os.PathLike | None = None,
) -> Prepared:
    """Return what is to be uploaded of a checkpoint folder.

    Args:
        folder, beside, base: as in `publish_folder`.
        near: a folder on the same file system, if `folder` may be renamed or deleted before the upload.

    Raises:
        MissingFileError: the folder is no checkpoint.
    """
    folder, beside = Path(folder), beside or {}
    _require_checkpoint(folder)
    temporary = tempfile.TemporaryDirectory(prefix=".publishing-", dir=near)
    staged = Path(temporary.name, "checkpoint")
    _link(folder, staged, _PUBLISHED)
    for name, other in beside.items():
        _link(Path(other), staged / name, ("*",))
    return Prepared(temporary, staged, tuple(f"{name}/*" for name in beside), base)


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that waits for its upload, in a temporary folder."""

    temporary: tempfile.TemporaryDirectory
    staged: Path
    replaced: tuple[str, ...] = ()
    base: str | os.PathLike | None = None

    def publish(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tags: str | Sequence[str] | None = None,
        card: str | None = None,
    ) -> str:
        """Upload it, once, and return the commit's address.

        Args:
            repo_id: `org/name`; created when it does not exist.
            private: whether a new repository is private.
            token, create_pr, commit_message, commit_description: as in huggingface_hub.
            revision: branch; created when it does not exist.
            tags: for the card, beside its own.
            card: text of README.md; by default the folder's or the repository's if a person edited it, else rendered.

        Raises:
            PublishingError: the Hub refuses.
        """
        with (
            self.temporary,
            _repository(repo_id, "model", private, token, revision, create_pr) as (api, repo_id),
        ):
            _warn_of_local_base(self.staged, repo_id)
            _write_card(api, self.staged, repo_id, revision, tags, card, self.base)
            stale = [*_STALE, *(_PROCESSOR if (self.staged / PROCESSOR_FILE).is_file() else ()), *self.replaced]
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=self.staged,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload policy",
                commit_description=commit_description,
                delete_patterns=stale,
            )
        return str(commit.commit_url)


def publish_policy(
    policy: Any, repo_id: str, processor: Any = None, max_shard_size: int | str = "5GB", **options: Any
) -> str:
    """Upload a policy with its processor and its records; other arguments as in `publish_folder`.

    Args:
        policy: with `save_pretrained`, and `loaded_from` where it was loaded.
        repo_id: `org/name`.
        processor: with `save_pretrained`; by default the one in the folder that the policy was loaded from.
        max_shard_size: weights are split into files of this size.
        options: see `publish_folder`.
    """
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        return publish_saved(policy, folder, repo_id, **options)


def publish_saved(policy: Any, folder: str | os.PathLike, repo_id: str | None = None, **options: Any) -> str:
    """Upload a folder in which a policy has been saved; arguments as in `publish_folder`."""
    complete_from_source(policy, folder)
    repo_id, tags = repo_id or Path(folder).absolute().name, _all_tags(policy, options.pop("tags", None))
    return publish_folder(folder, repo_id, tags=tags, base=origin_of(policy, folder), **options)


def origin_of(policy: Any, folder: str | os.PathLike) -> str | None:
    """Return what a policy was loaded from, unless that is the folder that it is saved to."""
    source = getattr(policy, "loaded_from", None)
    if source is None or source.is_adapter or source.folder.resolve() == Path(folder).resolve():
        return None
    return source.source


def publish_processor(
    processor: Any,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> str:
    """Upload a processor alone, into the repository of its policy, whose card stays as it is but for `tags`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _repository(repo_id, "model", private, token, revision, create_pr) as (api, repo_id),
    ):
        processor.save_pretrained(folder)
        if tags and (text := _published_card(api, repo_id, revision)):
            write_text(Path(folder, CARD_FILE), card_with_tags(text, _listed(tags)))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload processor",
            commit_description=commit_description,
            delete_patterns=list(_PROCESSOR),
        )
    return str(commit.commit_url)


def publish_dataset(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> str:
    """Upload a LeRobot dataset in one commit, with a card and the tag of its version; return the commit's address.

    Args:
        folder: with meta/, data/ and videos/.
        repo_id, private, token, revision, commit_message, tags: as in `publish_folder`.

    Raises:
        MissingFileError: the folder is no dataset.
        PublishingError: the Hub refuses.
    """
    folder = Path(folder)
    if not (folder / INFO_FILE).is_file():
        raise MissingFileError(f"{folder} has no {INFO_FILE}, so it is no LeRobot dataset.")
    version = read_json(folder / INFO_FILE).get("codebase_version")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary, "dataset")
        _link(folder, staged, (*_DATASET, CARD_FILE, "LICENSE*"))
        with _repository(repo_id, "dataset", private, token, revision, False) as (api, repo_id):
            own = _text(staged / CARD_FILE)
            kept = keep_edited(_published_card(api, repo_id, revision, "dataset"), dataset_card(folder, repo_id))
            write_text(staged / CARD_FILE, card_with_tags(keep_edited(own, kept), _listed(tags)))
            commit = api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=staged,
                revision=revision,
                commit_message=commit_message or "Upload dataset",
                delete_patterns=list(_DATASET),
            )
            if version and revision is None:  # readers of the format look for the data at the tag of its version
                with suppress(RevisionNotFoundError):
                    api.delete_tag(repo_id, tag=version, repo_type="dataset")
                api.create_tag(repo_id, tag=version, revision=commit.oid, repo_type="dataset")
    return str(commit.commit_url)


# --- the folder -------------------------------------------------------------------------------------------


def complete_from_source(policy: Any, folder: str | os.PathLike) -> None:
    """Copy what lies beside a policy's own checkpoint into the folder that it has been saved to.

    These are the processor, where the folder has none, and the records. A record of other weights is left out, and so
    is an evaluation with another config or processor.

    Raises:
        MissingFileError: another project's checkpoint, from which the policy was loaded without its processor.
    """
    folder, source = Path(folder), getattr(policy, "loaded_from", None)
    if source is not None and source.layout is not None and not (folder / PROCESSOR_FILE).is_file():
        raise MissingFileError(
            f"{source.source} keeps its statistics in the layout of {source.layout.name}, and the policy alone was "
            f"loaded from it, without the processor that is published with it. Publish both: "
            f"PolicyPipeline.from_pretrained({source.source!r}).push_to_hub(repo_id), or pass processor= here."
        )
    if source is None or source.layout is not None or source.folder.resolve() == folder.resolve():
        return
    if not (folder / PROCESSOR_FILE).is_file() and (source.folder / PROCESSOR_FILE).is_file():
        for path in source.folder.iterdir():
            if path.is_file() and _fits(path.name, _PROCESSOR):
                shutil.copyfile(path, folder / path.name)
    present = [name for name in RECORDS if (source.folder / name).is_file() and not (folder / name).exists()]
    if not present:
        return
    same_weights = _same_tensors(folder, source.folder)
    same_use = same_weights and all(
        _computing(folder / name) == _computing(source.folder / name) for name in (CONFIG_FILE, PROCESSOR_FILE)
    )
    kept = {TRAINING_FILE: same_weights, LEARNING_CURVE_FILE: same_weights}
    for name in present:
        if kept.get(name, same_use):
            shutil.copyfile(source.folder / name, folder / name)
        else:
            logger.warning(f"{name} of {source.source} is left out: the policy has changed since it was written.")


def _computing(path: Path) -> dict[str, Any]:
    bookkeeping = ("_name_or_path", "transformers_version", "dtype", "architectures", "peft_version")
    content = read_json(path) if path.is_file() else {}
    return {name: value for name, value in content.items() if name not in bookkeeping}


def _same_tensors(folder: Path, other: Path) -> bool:
    """Compare two sets of weights bit by bit, however they are split into files."""
    from safetensors import safe_open

    with _opened(folder, safe_open) as ours, _opened(other, safe_open) as theirs:
        return ours.keys() == theirs.keys() and all(
            _same(ours[name].get_tensor(name), theirs[name].get_tensor(name)) for name in ours
        )


def _same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


@contextmanager
def _opened(folder: Path, safe_open: Any) -> Iterator[dict[str, Any]]:
    paths = [path for path in sorted(folder.glob("*.safetensors")) if _fits(path.name, _WEIGHTS)]
    files = [safe_open(path, framework="pt") for path in paths]
    yield {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _require_checkpoint(folder: Path) -> None:
    for pattern in (CONFIG_FILE, "*model*.safetensors"):
        if not any(folder.glob(pattern)):
            held = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
            raise MissingFileError(
                f"{folder} holds no {pattern.replace('*', '')}, so it is no checkpoint; it holds {held or 'nothing'}."
            )


def _link(folder: Path, target: Path, patterns: Sequence[str]) -> None:
    """Fill a folder with links to the files of another that fit patterns; nothing is copied."""
    target.mkdir(parents=True)
    deep = any("/" in pattern or pattern == "*" for pattern in patterns)
    for path in folder.rglob("*") if deep else folder.iterdir():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _fits(name, patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), target / name)
            except OSError:  # another file system
                os.symlink(path.resolve(), target / name)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# --- the card ---------------------------------------------------------------------------------------------


def _write_card(
    api: HfApi, staged: Path, repo_id: str, revision: str | None, tags: Any, text: str | None, base: Any
) -> None:
    own, published = _text(staged / CARD_FILE), _published_card(api, repo_id, revision)
    described = checkpoint_card(staged, repo_id, base, needs_processor=False)
    origin = described.base_model or (repo_id if str(base) == repo_id else None)
    if origin and (found := license_of_card(_card_of_base(api, origin))):
        fields = license_fields(described.model_type, described.policy_name, described.parameters, True, found)
        described = replace(described, **fields)
    (staged / CARD_FILE).unlink(missing_ok=True)  # a link, as all else there; the folder keeps its own
    told = {name: without_local_paths(getattr(described, name)) for name in ("training", "evaluation")}
    described = replace(described, **told)
    for record in (TRAINING_FILE, EVALUATION_FILE):
        _hide_local_paths(staged / record)
    if described.evaluation:
        (staged / EVAL_RESULTS_FILE).parent.mkdir(exist_ok=True)
        write_text(staged / EVAL_RESULTS_FILE, eval_results(described.evaluation))
    rendered = save_card(described, staged).read_text(encoding="utf-8")
    chosen = text or keep_edited(own, keep_edited(published, rendered))
    if published and was_edited(published) and chosen.strip() != published.strip():
        logger.warning(f"The edited card of {repo_id} is replaced by yours; it stays in the repository's history.")
    write_text(staged / CARD_FILE, card_with_tags(chosen, _listed(tags)))


def _hide_local_paths(path: Path) -> None:
    """Leave of folders of this computer their names; the record in the folder itself stays as it is."""
    record = read_json(path) if path.is_file() else {}
    public = without_local_paths(record)
    if record.get("checkpoint"):
        public["checkpoint"] = public_name(record["checkpoint"])
    if public != record:
        write_text(path, json.dumps(public, indent=2) + "\n")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _listed(tags: str | Sequence[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or ())


def _all_tags(policy: Any, tags: str | Sequence[str] | None) -> list[str]:
    return list(dict.fromkeys([*(getattr(policy, "model_tags", None) or ()), *_listed(tags)]))


def _warn_of_local_base(folder: Path, repo_id: str) -> None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base, _ = base_of(folder)
    if os.path.isdir(base) or not is_hub_id(base):
        logger.warning(
            f"{repo_id} is an adapter, and its base {base!r} is a folder of this computer: nobody else can load it. "
            f"Publish a policy that needs no base: manipulators.merge_and_save(policy, folder), then "
            f"manipulators push folder {repo_id}. Or train the adapter on a base on the Hub."
        )


# --- the Hub ----------------------------------------------------------------------------------------------


@contextmanager
def _repository(
    repo_id: str, kind: str, private: bool | None, token: Any, revision: str | None, create_pr: bool
) -> Iterator[tuple[HfApi, str]]:
    """Yield a client and the full name of a repository that exists, with its branch; the Hub's errors are named."""
    api = HfApi(token=token)
    with naming_hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind).repo_id
        if revision not in (None, "main") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
        yield api, repo_id


@contextmanager
def naming_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn an error of the Hub, or of the way to it, into one that names the repository.

    Raises:
        PublishingError: there was one.
    """
    try:
        yield
    except ManipulatorsError:
        raise
    except Exception as error:
        if not _is_the_clients(error):
            raise
        raise PublishingError(repo_id, error) from error


def _is_the_clients(error: Exception) -> bool:
    """Tell whether an error comes from the Hub, the way to it or the files; the client's HTTP library may change."""
    return isinstance(error, (OSError, HFValidationError)) or type(error).__module__.startswith("httpx")


def _published_card(api: HfApi, repo_id: str, revision: str | None, kind: str = "model") -> str | None:
    """Return the README.md of a repository that exists; None where it has none."""
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, repo_type=kind)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def _card_of_base(api: HfApi, repo_id: str) -> str | None:
    """Return the README.md of another repository, if it can be read."""
    try:
        return _published_card(api, repo_id, None)
    except Exception as error:
        if not _is_the_clients(error):
            raise
        return None
