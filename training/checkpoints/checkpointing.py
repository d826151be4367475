"""Checkpointing: the half of a trainer that writes checkpoints whole or not at all, and reads them strictly."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..._files import replace_folder
from ...hub_cards.checkpoint_card import write_checkpoint_card
from ...hub_cards.publish import origin_of
from ...modeling.adapters import has_adapter, load_adapter_tensors
from ...modeling.sharding import gathered, is_split
from .folders import (
    naming_a_full_disk,
    require_finite_state,
    require_fitting_weights,
    save_average,
    save_progress,
    surplus_checkpoints,
)
from .run_record import require_same_run, run_record, save_run_record
from .split_state import load_whole_optimizer_state, load_whole_weights, whole_optimizer_state

STAGING_FOLDER = ".incomplete"  # in the output folder; resuming looks only at finished checkpoints beside it


class Checkpointing:
    """Write checkpoints beside and rename them; a base class of `PolicyTrainer`, before transformers' own.

    A checkpoint holds policy, processor, card, averaged weights, the progress of the run and what the run was.
    """

    _staging: str | None = None  # while a checkpoint is written
    _resumed_from: str | None = None
    _record: dict[str, Any] | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a staging folder and rename it when complete; a killed run leaves no partial one."""
        run = super()._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = os.path.join(run, STAGING_FOLDER)
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        try:
            averaged = self._average.tensors if self._average is not None else None
            require_finite_state(os.path.join(run, name), run, self.model, self.optimizer, averaged)
            with naming_a_full_disk(run):
                self._write_checkpoint(model, trial, run, name)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _write_checkpoint(self, model: nn.Module, trial: Any, run: str, name: str) -> None:
        """Write a checkpoint to the staging folder, and rename it."""
        super()._save_checkpoint(model, trial)
        averaged = self._average.whole_tensors() if self._average is not None else None
        losses = self._mean_parts() | {"loss": self.accelerator.reduce(self._tr_loss, reduction="mean")}
        if self.args.should_save:
            folder = os.path.join(self._staging, name)
            progress = {
                "logged_at": self._globalstep_last_logged,
                "last_step": {name: float(v) for name, v in self._last_step.items() if v is not None},
                "epoch_has_ended": self._epoch_has_ended,
                "seconds": self.training_seconds,
            }
            save_progress(folder, losses, progress)
            save_run_record(folder, self._run_record())
            if averaged is not None:
                save_average(folder, averaged, self._average.updates)
        self.accelerator.wait_for_everyone()  # every process writes its own random state
        if self.args.should_save:
            self._name_best_checkpoint(run)
            self.state.save_to_json(os.path.join(self._staging, name, TRAINER_STATE_NAME))
            replace_folder(os.path.join(self._staging, name), os.path.join(run, name))
            if self.args.push_to_hub:
                self._publish_checkpoint(os.path.join(run, name))
            surplus = surplus_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)
            self._remove(surplus, run)

    def _remove(self, checkpoints: list[Path], run: str) -> None:
        """Delete checkpoints, moved away first, so that a killed run leaves no partial one to resume from."""
        staging = Path(run, STAGING_FOLDER)
        for path in checkpoints:
            staging.mkdir(exist_ok=True)
            os.replace(path, staging / path.name)
        shutil.rmtree(staging, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _name_best_checkpoint(self, run: str) -> None:
        """Name the best checkpoint in the state by its final path, not by the staging folder."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if any(os.path.isdir(os.path.join(folder, best)) for folder in (run, self._staging)):
            self.state.best_model_checkpoint = os.path.join(run, best)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Return all weights in the main process and nothing in the others; None where each of them has all.

        Called in every process, which FSDP and DeepSpeed let hold a part.
        """
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped) or {}
        return gathered(self.model.state_dict()) if self._is_split else None

    @property
    def _is_split(self) -> bool:
        return is_split(dict(self.model.named_parameters()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save policy, processor and card; with `ema_decay` the averaged weights, except in a checkpoint."""
        if not self._is_split:
            super().save_model(output_dir, _internal_call)
            return
        with self.averaged_weights() if self._staging is None else nullcontext():
            self._save(output_dir or self.args.output_dir, self.whole_weights())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write both as one process would, so that a run goes on in any number of processes."""
        if not self._is_split:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_split:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        paths = [os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        if all(map(os.path.isfile, paths)):
            state, schedule = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
            load_whole_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(schedule)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Checkpoints keep the current weights for resuming; everything else that is saved is published.
        with self.averaged_weights() if self._staging is None else nullcontext():
            if self._staging is None:
                require_finite_state(output_dir or self.args.output_dir, self.args.output_dir, self.model)
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.processor.save_pretrained(folder)
            write_checkpoint_card(folder, base=origin_of(self._saved_policy, folder))

    def _run_record(self) -> dict[str, Any]:
        if self._record is None:  # the dataset is read once
            data = (self.train_dataset, self._augmentation)
            self._record = run_record(self._saved_policy, self.processor, self.args, *data)
        return self._record

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        require_same_run(resume_from_checkpoint, self._saved_policy, self.processor, self._run_record())
        self._resumed_from = resume_from_checkpoint
        model = self.model if model is None else model
        if has_adapter(model):
            load_adapter_tensors(model, resume_from_checkpoint)
            return
        require_fitting_weights(resume_from_checkpoint, model)
        if self._is_split:
            load_whole_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapter(self.model):
            load_adapter_tensors(self.model, self.state.best_model_checkpoint)
        else:
            require_fitting_weights(self.state.best_model_checkpoint, self.model)
            if self._is_split:
                load_whole_weights(self.model, self.state.best_model_checkpoint)
            else:
                super()._load_best_model()
        if self._average is not None:
            self._average.load(self.state.best_model_checkpoint)
