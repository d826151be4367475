"""PolicyTrainer: transformers' Trainer for policies and their processors."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from .._lock import is_held, locked
from ..configuration.crops import small_crops
from ..data.mixture import MixtureDataset
from ..errors import DivergedTrainingError, InvalidConfigError
from ..modeling.adapters import has_adapter, require_saved, unwrapped
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from .arguments import PolicyTrainingArguments
from .augmentation import Augmentation
from .callbacks import PolicyProgressCallback, StepCallback
from .checkpoints.checkpointing import Checkpointing
from .checkpoints.folders import (
    EMA_FILE,
    last_checkpoint,
    load_progress,
    require_finite_state,
    surplus_checkpoints,
)
from .collator import DATASET_INDEX, PolicyCollator
from .dataset_losses import as_means, sums_by_dataset
from .global_mean import GlobalMean
from .predicting import Predicting
from .processes import require_honoured, seed_process
from .publishing import Publishing, require_card
from .streaming import require_steps, stream_batches
from .tuning import apply_tuning, parameter_table

if TYPE_CHECKING:
    from .ema import WeightAverage

logger = logging.get_logger(__name__)


class PolicyTrainer(Predicting, Publishing, Checkpointing, Trainer):
    """Train a policy: named loss parts in the logs, a learning rate per part, checkpoints with the processor.

    What `predict` returns and `compute_metrics` is given are predicted actions (n, h, a), normalised as the labels
    are, without padded dimensions; `processor.decode_actions(…, padded=False)` turns both into robot units. A policy
    that samples does so with a seed. Labels are `actions`; with `label_names=["actions", "action_is_pad"]` they are
    both, as a tuple. transformers' own Trainer predicts actions only where a policy needs them for its loss, as ACT
    does.

    Args:
        model (`PolicyModel`): the policy, also one that peft has wrapped, such as
            `get_peft_model(policy, LoraConfig(…))`: its adapter is trained and saved.
        args (`PolicyTrainingArguments`): the training arguments.
        processor (`PolicyProcessor`): turns samples into model inputs, and is saved in every checkpoint; Trainer's
            name for it, `processing_class`, is understood too.
        train_dataset, eval_dataset (`Dataset`): of samples under the dataset's names, such as `LeRobotDataset`.
        augmentation (`Augmentation`, *optional*): variation of the pictures of training batches.
        kwargs: other arguments of `transformers.Trainer`; `model_init` in place of `model` builds a policy for every
            run, as `hyperparameter_search` needs. What is to be tuned is applied to each.

    Raises:
        InvalidConfigError: model, arguments or processor are absent, or of another kind.
    """

    def __init__(
        self,
        model: PolicyModel | None = None,
        args: PolicyTrainingArguments | None = None,
        processor: PolicyProcessor | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        processing_class: PolicyProcessor | None = None,
        **kwargs: Any,
    ):
        processor = processing_class if processor is None else processor
        _require(args, processor)
        require_steps(train_dataset, args)
        # Not as `processing_class`: Trainer would copy a tokenizer's special tokens into the policy's config.
        self.args, self.processor = args, processor
        if model is not None or kwargs.get("model_init") is None:
            model = self._prepared(model)
        if augmentation is not None and "data_collator" in kwargs:
            raise InvalidConfigError(
                "augmentation= belongs to the collator; give it to yours: PolicyCollator(processor, augmentation)."
            )
        kwargs.setdefault("data_collator", PolicyCollator(processor))
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[
                StepCallback(self),
                *(callbacks or ()),
            ],  # first, so that other callbacks see the averaged weights
            **kwargs,
        )
        if args.ema_decay is not None and self.is_deepspeed_enabled:
            raise InvalidConfigError(
                "ema_decay averages parameters that DeepSpeed keeps to itself. Leave it out, or train with DDP or "
                "FSDP2."
            )
        require_honoured(self.accelerator, self.is_fsdp_enabled)
        if args.world_size > 1 and args.data_seed is None:
            # By default the order would follow torch's seed, which a caller may have set differently in each process.
            self.accelerator.dataloader_config.data_seed = args.seed
        if self.is_world_process_zero():
            for sentence in (*_fragile_dimensions(processor), *small_crops(self.model.config.to_dict())):
                logger.warning(sentence)
        if args.label_names is None:
            self.label_names = ["actions"]
        self._augmentation = augmentation
        self._epoch_has_ended, self._must_end_epoch = True, False
        self._last_step: dict[str, torch.Tensor | float | None] = {}
        self._average: WeightAverage | None = None
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._steps, self._step_mean = 0, GlobalMean(self.accelerator)
        self._data_seconds, self._logged_at = 0.0, None
        self._seconds_before, self._began = 0.0, None
        self.has_begun = False  # whether a batch has been read: what fails before is an argument's fault
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(PolicyProgressCallback())
        self.remove_callback(PrinterCallback)

    def call_model_init(self, trial: Any = None) -> PolicyModel:
        """Return the policy of a new run, as `model_init` builds it, with what is to be tuned."""
        if trial is not None:  # transformers would set the trial's arguments only once the policy is there
            self._hp_search_setup(trial)
        return self._prepared(super().call_model_init(trial))

    def _prepared(self, model: Any) -> PolicyModel:
        """Return the policy that is to be trained, once it fits the processor and its parts are tuned.

        Raises:
            InvalidConfigError: it is no policy, or has an adapter that would not be saved with all that is trained.
        """
        policy = unwrapped(model)
        if not isinstance(policy, PolicyModel):
            given = "" if policy is None else f", not {type(policy).__name__}"
            raise InvalidConfigError(f"PolicyTrainer needs a policy{given}: PolicyTrainer(model=policy, …).")
        self.args.check()
        self.processor.check_agreement(policy.config)
        require_card(policy, self.processor)
        if any(mode is not None for mode in self.args.tuning.values()):
            apply_tuning(policy, self.args.tuning, **self.args.lora_options)
            logger.info(f"What is trained:\n{parameter_table(policy)}")
        if has_adapter(policy):
            require_saved(policy)
        if self.args.neftune_noise_alpha is not None:
            _require_noisy_embedding(policy)
        return policy

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches, the only ones with augmentation; of a mixture with each sample's dataset."""
        plain = self.data_collator
        own = isinstance(plain, PolicyCollator) and isinstance(self.train_dataset, MixtureDataset)
        if self._augmentation is not None or own:
            self.data_collator = PolicyCollator(self.processor, self._augmentation, with_datasets=own)
        try:
            batches = stream_batches(self)
            return super().get_train_dataloader() if batches is None else batches
        finally:
            self.data_collator = plain

    # --- the run --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; with `ema_decay` the policy holds the averaged weights afterwards.

        Arguments as in `transformers.Trainer.train`. A run that is resumed equals one that was not interrupted.

        Raises:
            FolderInUseError: another run writes into the output folder.
        """
        output = self.args.output_dir
        if self.args.should_save and not is_held(output):
            with locked(output, "a training"):
                return self.train(resume_from_checkpoint, *args, **kwargs)
        self._resumed_from, self._record, self.has_begun = None, None, False
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._average is not None:
                self._average.copy_to_weights()
            require_finite_state(output, output, self.model)  # the last step's result
            return result
        finally:
            self._average = None
            self._seconds_before, self._began = self.training_seconds, None

    @property
    def training_seconds(self) -> float:
        """The time that the steps of the run took, those before it was resumed included [s]."""
        return self._seconds_before + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def _begin(self) -> None:
        """Restore what a checkpoint holds beyond transformers' own state."""
        folder = self._resumed_from
        if self.args.world_size > 1 or folder is not None:
            seed_process(self.args, folder, self.state.global_step)
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self._loss_parts, self._steps, self._must_end_epoch = {}, 0, False
        if folder is not None and (saved := load_progress(folder)) is not None:
            losses, progress = saved
            self._globalstep_last_logged, self._last_step = progress["logged_at"], progress["last_step"]
            self._seconds_before = progress.get("seconds", 0.0)  # absent where an earlier version wrote it
            self._steps = self.state.global_step - self._globalstep_last_logged
            self._loss_parts = {name: value.to(self.args.device) for name, value in losses.items()}
            self._tr_loss += self._loss_parts.pop("loss")
            self._total_loss_scalar -= self._tr_loss.item()  # `train_loss` is the mean of the steps taken here
            is_last = self.state.global_step >= self.state.max_steps or self.state.epoch % 1 == 0
            self._must_end_epoch = is_last and not progress["epoch_has_ended"]
        if self.args.ema_decay is not None:
            from .ema import WeightAverage  # imported here, because it imports diffusers' models

            self._average = WeightAverage(self.model, **self.args.ema_options)
            if folder is not None:
                self._average.load(folder)
        elif folder is not None and Path(folder, EMA_FILE).is_file():
            logger.warning(f"{folder} holds averaged weights, which are dropped: pass ema_decay to go on with them.")

    def _run_epoch(self, model: nn.Module, trial: Any, start_time: float, **kwargs: Any) -> None:
        if self._end_epoch(model, trial, start_time):
            kwargs["resume_from_checkpoint"] = None  # whose random state is from before the evaluation just made
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers would take one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(model=model, trial=trial, start_time=start_time, **kwargs)

    def _end_epoch(self, model: nn.Module, trial: Any, start_time: float) -> bool:
        """Run the end of an epoch that a killed run did not reach after its last step's checkpoint."""
        if not self._must_end_epoch:
            return False
        self._must_end_epoch = False
        self._load_rng_state(self._resumed_from)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        last = (self._last_step.get("grad_norm"), self._last_step.get("learning_rate"))
        self._maybe_log_save_evaluate(
            self._tr_loss, last[0], model, trial, None, None, start_time, learning_rate=last[1]
        )
        return True

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args: Any, learning_rate=None, **kwargs: Any) -> None:
        self._last_step = {"grad_norm": grad_norm, "learning_rate": learning_rate}  # read when a checkpoint is written
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float):
        self._end_epoch(self.model_wrapped, trial, start_time)
        # transformers would delete the last checkpoint in place, file by file, when only the best one is to stay.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            result = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:  # also those that a killed run did not delete
            run, best = self._get_output_dir(trial), self.state.best_model_checkpoint
            only_best = limit == 1 and best is not None
            self._remove(surplus_checkpoints(run, limit, best, keep_last=not only_best), run)
        return result

    # --- averaged weights -----------------------------------------------------------------------------

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Give the policy its averaged weights inside the block; without `ema_decay` it keeps its own."""
        return self._average.applied() if self._average is not None else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of the evaluation, with the averaged weights if there are any."""
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any):
        """Return predictions, with the averaged weights if there are any."""
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

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
        """Return the loss, and keep its named parts for the log.

        The losses of a step's batches, in all processes, together are the mean over what counts in all of them.
        """
        inputs = dict(inputs)
        index = inputs.pop(DATASET_INDEX, None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        policy, parts = self._saved_policy, outputs.losses or {}
        if self.compute_loss_func is None:  # the caller's own reduction stands
            if model.training:
                loss, parts = self._step_mean.loss(policy, inputs, loss, parts)
            elif self._evaluation_mean is not None:
                self._evaluation_mean.add(policy, inputs, loss)
        if model.training:
            for name, value in parts.items():  # summed on the device: no wait per step
                self._loss_parts[name] = self._loss_parts.get(name, 0) + value.detach() / self._step_mean.batches
            if index is not None and outputs.sample_errors is not None:
                for name, sums in sums_by_dataset(outputs.sample_errors, index, self.train_dataset.names).items():
                    self._loss_parts[name] = self._loss_parts.get(name, 0) + sums
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """Fetch the next batches and measure the time it takes."""
        start = time.perf_counter()
        self._logged_at = self._logged_at or start  # the time before the first batch is set-up
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._data_seconds += time.perf_counter() - start
        self.has_begun = True
        self._step_mean.begin(self._saved_policy, batches)
        self._steps += bool(batches)
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss parts and the share of time spent waiting for data.

        Raises:
            DivergedTrainingError: the loss is not finite.
        """
        parts: dict[str, float] = {}
        if "loss" in logs:
            parts = as_means(self._mean_parts(), self._steps)
            now = time.perf_counter()
            waited = self._data_seconds / max(now - (self._logged_at or now), 1e-9)
            logs |= parts | {"data_wait": round(waited, 4)}
            self._loss_parts, self._steps = {}, 0
            self._data_seconds, self._logged_at = 0.0, now
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # the latter is the whole run's, at its end
        if not math.isfinite(loss):
            raise DivergedTrainingError(self.state.global_step, loss, parts, last_checkpoint(self.args.output_dir))
        super().log(logs, *args, **kwargs)

    def _mean_parts(self) -> dict[str, torch.Tensor]:
        """Return the sums of the named losses since the last log, as means over the processes."""
        return self.accelerator.reduce(self._loss_parts, reduction="mean") if self._loss_parts else {}


def _fragile_dimensions(processor: PolicyProcessor) -> list[str]:
    """Return what `processing.fragile` says of every robot that a processor knows."""
    if not processor.embodiments or processor.embodiment is not None:
        return processor.robots.fragile_dimensions(processor.dimension_names or {})
    each = [(name, processor.for_embodiment(name)) for name in processor.embodiments]
    return [f"{name}: {sentence}" for name, own in each for sentence in _fragile_dimensions(own)]


def _require(args: Any, processor: Any) -> None:
    """Check what a trainer cannot do without."""
    if not isinstance(processor, PolicyProcessor):
        raise InvalidConfigError(
            f"PolicyTrainer needs the policy's processor, not {processor!r}: PolicyTrainer(…, processor=processor)."
        )
    if not isinstance(args, PolicyTrainingArguments):
        raise InvalidConfigError(
            f"PolicyTrainer takes PolicyTrainingArguments, which has every field of TrainingArguments; got "
            f"{type(args).__name__}."
        )


def _require_noisy_embedding(policy: PolicyModel) -> None:
    """Check that NEFTune has an effect: noise is added to the words of a language model in training mode."""
    mode = policy.training
    embedding = policy.train().get_input_embeddings()
    trains = None if embedding is None else embedding.training
    policy.train(mode)
    if not trains:
        reason = "has no language model" if trains is None else "has a language model that is frozen whole"
        raise InvalidConfigError(
            f"neftune_noise_alpha adds noise to the words of an instruction, but {type(policy).__name__} {reason}. "
            f"Leave it out{'' if trains is None else ', or train a part of it: tune_llm'}."
        )
