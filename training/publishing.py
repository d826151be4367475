"""Publishing: the half of a trainer that uploads what it has made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import CONFIG_NAME, PushInProgress, logging

from ..hub_cards.card import render_card
from ..hub_cards.checkpoint_card import describe_policy, write_checkpoint_card
from ..hub_cards.publish import naming_hub_errors, origin_of, prepare_folder, publish_saved
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor

logger = logging.get_logger(__name__)


def require_card(policy: PolicyModel, processor: PolicyProcessor, record: Mapping[str, Any] | None = None) -> None:
    """Check that the card of what is trained can be written; nothing is written.

    Args:
        policy, processor: what is trained.
        record: content of training.json, as far as it is known.

    Raises:
        CardError, InvalidConfigError: a value that a card cannot state, such as names that do not fit a feature.
    """
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    render_card(describe_policy(policy.config.to_dict(), processor.to_dict(), parameters, record))


class Publishing:
    """Publish policy, processor, records and card; a base class of `PolicyTrainer`, before transformers' own."""

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository before the training, if there is none; arguments as in `transformers.Trainer`.

        Raises:
            PublishingError: the Hub refuses or is out of reach.
        """
        with naming_hub_errors(self._publishing_options()["repo_id"]):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> str | Future | None:
        """Save policy, processor and card in the output folder and publish it; arguments as in `transformers.Trainer`.

        Returns:
            The commit's address, a future of it where `blocking` is False, None in processes other than the first.

        Raises:
            PublishingError: the Hub refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # in every process, as sharded weights are gathered
        if not self.is_world_process_zero():
            return None
        options = self._publishing_options(token, revision, private)
        options |= {"commit_message": commit_message, "tags": tags}
        if not blocking:
            return HfApi().run_as_future(self.publish, self.args.output_dir, **options)
        return self.publish(self.args.output_dir, **options)

    def publish(self, folder: str | os.PathLike, **options: Any) -> str:
        """Publish a folder that the policy has been saved to, by default where the arguments say."""
        self._finish_current_push()
        return publish_saved(self._saved_policy, folder, **self._publishing_options() | options)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write this library's card, in place of the one that Trainer writes; its arguments have no place in it."""
        if not Path(self.args.output_dir, CONFIG_NAME).is_file():
            self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            write_checkpoint_card(self.args.output_dir, self.hub_model_id)

    @property
    def _saved_policy(self) -> PolicyModel:
        return self.accelerator.unwrap_model(self.model)

    def _publishing_options(self, token: Any = None, revision: str | None = None, private: bool | None = None):
        arguments = self.args
        return {
            "repo_id": getattr(self, "hub_model_id", None)
            or arguments.hub_model_id
            or Path(arguments.output_dir).absolute().name,
            "token": token if token is not None else arguments.hub_token,
            "revision": revision or arguments.hub_revision,
            "private": private if private is not None else arguments.hub_private_repo,
        }

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing here: the folder is about to be renamed; `_publish_checkpoint` follows."""

    def _publish_checkpoint(self, folder: str) -> None:
        """Publish a finished checkpoint while the training goes on; one upload at a time."""
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        in_progress = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if in_progress and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(folder).name
        whole = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        beside, origin = {name: folder} if whole else None, origin_of(self._saved_policy, folder)
        prepared = prepare_folder(folder, beside, origin, near=Path(folder).parent)
        message = f"Training in progress, step {self.state.global_step}"
        options = self._publishing_options() | {"commit_message": message}
        self.push_in_progress = PushInProgress([HfApi().run_as_future(prepared.publish, **options)])

    def _finish_current_push(self) -> None:
        """Wait for the upload of a checkpoint, and say so if it failed: the run itself goes on."""
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if getattr(self, "push_in_progress", None) is not None else ():
            if (error := job.exception()) is not None:
                logger.warning(f"A checkpoint was not uploaded: {error}")
        self.push_in_progress = None
