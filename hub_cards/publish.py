"""Publish a policy: weights, processor and our card in one commit; a card that a person edited is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from .card import CARD_FILE, render_card
from .checkpoint_card import describe_policy
from .edits import keep_edited
from .wording import is_hub_id

# Deleted from the repository unless they are uploaded again: a repository holds one set of weights.
_OTHER_WEIGHTS = [
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_base.json"),
]


def upload_checkpoint(
    policy: Any,
    repo_id: str,
    processor: Any = None,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload policy",
    commit_description: str | None = None,
    max_shard_size: int | str = "5GB",
) -> str:
    """Upload a policy with its processor and a card; return the commit's address.

    Args:
        policy: with `save_pretrained` and `config`.
        repo_id: `org/name`; created when it does not exist.
        processor: with `save_pretrained`; its statistics fill the card's table.
        card: text of README.md; rendered from the policy and its processor by default.
        private, token, revision, create_pr, commit_message, commit_description: as in huggingface_hub.
        max_shard_size: weights are split into files of this size.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if card is None:
        described = describe_policy(
            policy.config.to_dict(),
            processor.to_dict() if processor is not None else {},
            sum(weight.numel() for weight in policy.state_dict().values()),
            repo_id=repo_id,
            base_model=_base_of_adapter(policy),
        )
        card = render_card(described)
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        card = keep_edited(_published_card(api, repo_id, revision), card)
        Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            delete_patterns=_OTHER_WEIGHTS,
        )
    return str(commit.commit_url)


def _base_of_adapter(policy: Any) -> str | None:
    base = getattr(policy, "_adapter_base", {}).get("base")
    return base if is_hub_id(base) else None


def _published_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")
