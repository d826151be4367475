"""PolicyTrainer: transformers' Trainer, with what training a policy needs on top."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .._files import replace_folder
from ..errors import (
    CorruptFileError,
    DivergedTrainingError,
    InvalidConfigError,
    MissingFileError,
    WeightsMismatchError,
)
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from .arguments import PolicyTrainingArguments
from .augmentation import Augmentation
from .collator import PolicyCollator

STAGING_FOLDER = ".incomplete"  # in the output folder; resuming looks only at finished checkpoints beside it


class PolicyTrainer(Trainer):
    """Train a policy: named loss parts in the logs, a learning rate per part, checkpoints with the processor.

    Args:
        model (`PolicyModel`): the policy.
        args (`PolicyTrainingArguments`): how to train.
        processor (`PolicyProcessor`): turns samples into model inputs, and is saved in every checkpoint.
        train_dataset, eval_dataset (`Dataset`): of samples under the dataset's names, such as `LeRobotDataset`.
        augmentation (`Augmentation`, *optional*): how the pictures of training batches vary.
        kwargs: what `transformers.Trainer` takes.
    """

    def __init__(
        self,
        model: PolicyModel,
        args: PolicyTrainingArguments,
        processor: PolicyProcessor,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ):
        processor.check_agreement(model.config)
        if augmentation is not None and "data_collator" in kwargs:
            raise InvalidConfigError(
                "augmentation= belongs to the collator; give it to yours: PolicyCollator(processor, augmentation)."
            )
        kwargs.setdefault("data_collator", PolicyCollator(processor))
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # Not as `processing_class`: Trainer would copy a tokenizer's special tokens into the policy's config.
        self.processor = processor
        self._augmentation = augmentation
        self._staging: str | None = None
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._steps, self._batches_of_step = 0, 1
        self._data_seconds, self._logged_at = 0.0, None
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(PolicyProgressCallback())
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches, the only ones whose pictures are augmented."""
        plain = self.data_collator
        if self._augmentation is not None:
            self.data_collator = PolicyCollator(self.processor, self._augmentation)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    # --- optimizer ------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with one learning rate per part of the policy that has its own."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self.parameter_groups(model), **kwargs)
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return optimizer groups: trainable parameters by part, then by whether weight decay applies."""
        decayed = set(self.get_decay_parameter_names(model))
        prefixes = self._visual_prefixes()
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                visual = self.args.learning_rate_visual is not None and name.startswith(prefixes)
                groups.setdefault((visual, name in decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "lr": self.args.learning_rate_visual if visual else self.args.learning_rate,
            }
            for (visual, decays), parameters in sorted(
                groups.items(), key=lambda item: item[0][0]
            )  # logged: the first
        ]

    def _visual_prefixes(self) -> tuple[str, ...]:
        prefixes = self.accelerator.unwrap_model(self.model).parameter_parts.get("tune_visual", ())
        present = [n for n, _ in self.model.named_parameters() if n.startswith(prefixes)] if prefixes else []
        if self.args.learning_rate_visual is not None and not present:
            raise InvalidConfigError(
                f"learning_rate_visual={self.args.learning_rate_visual}, but the policy has no vision backbone "
                f"(no cameras in its input_features). Leave it out."
            )
        return prefixes

    # --- losses and logs ------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss, and keep its named parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            for name, value in (outputs.losses or {}).items():  # summed on the device: no wait per step
                self._loss_parts[name] = self._loss_parts.get(name, 0) + value.detach() / self._batches_of_step
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """Fetch the next batches, and keep the time that took."""
        start = time.perf_counter()
        self._logged_at = self._logged_at or start  # what comes before the first batch is set-up
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._data_seconds += time.perf_counter() - start
        if batches:
            self._steps, self._batches_of_step = self._steps + 1, len(batches)
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss parts and the share of time spent waiting for data.

        Raises:
            DivergedTrainingError: the loss is not finite.
        """
        parts: dict[str, float] = {}
        if "loss" in logs:
            parts = {name: (value / self._steps).item() for name, value in self._loss_parts.items()}
            now = time.perf_counter()
            logs |= parts | {"data_wait": round(self._data_seconds / max(now - self._logged_at, 1e-9), 4)}
            self._loss_parts, self._steps = {}, 0
            self._data_seconds, self._logged_at = 0.0, now
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # the latter is the whole run's, at its end
        if not math.isfinite(loss):
            raise DivergedTrainingError(self.state.global_step, loss, parts)
        super().log(logs, *args, **kwargs)

    # --- checkpoints ----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside the others and rename it when it is whole: a kill leaves no half of one."""
        run = super()._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = os.path.join(run, STAGING_FOLDER)
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes its own random state
            if self.args.should_save:
                self._name_best_checkpoint(run)
                self.state.save_to_json(os.path.join(self._staging, name, TRAINER_STATE_NAME))
                replace_folder(os.path.join(self._staging, name), os.path.join(run, name))
                rotate_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _name_best_checkpoint(self, run: str) -> None:
        """Let the state name the best checkpoint where it will be, not where it is being written."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if any(os.path.isdir(os.path.join(folder, best)) for folder in (run, self._staging)):
            self.state.best_model_checkpoint = os.path.join(run, best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _require_fitting_weights(resume_from_checkpoint, self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        _require_fitting_weights(self.state.best_model_checkpoint, self.model)
        super()._load_best_model()


class PolicyProgressCallback(ProgressCallback):
    """Show the latest losses behind the progress bar instead of a line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Put loss and learning rate behind the bar."""
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {
                name: f"{value:.3g}"
                for name, value in logs.items()
                if isinstance(value, (int, float)) and name not in ("epoch", "grad_norm", "step", "data_wait")
            }
            self.training_bar.set_postfix(shown, refresh=False)


def _require_fitting_weights(folder: str | os.PathLike, model: nn.Module) -> None:
    """Compare a checkpoint's tensors with the model's: transformers resumes from half of them without a word."""
    paths = sorted(Path(folder).glob("model*.safetensors"))
    if not paths:
        if any(Path(folder).glob("adapter_model*.safetensors")):
            return  # peft compares an adapter's tensors itself
        held = ", ".join(sorted(path.name for path in Path(folder).glob("*"))) or "nothing"
        raise MissingFileError(
            f"{folder} holds no model.safetensors to resume from; it holds {held}. Pickled weights are never read."
        )
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(path, "safetensors file", error) from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    mismatched = [(n, s, expected[n]) for n, s in found.items() if n in expected and s != expected[n]]
    if missing or unexpected or mismatched:
        raise WeightsMismatchError(str(folder), missing, unexpected, mismatched)
