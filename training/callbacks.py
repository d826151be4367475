"""What a training does between its steps: restore and average, and show its losses."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback


class StepCallback(TrainerCallback):
    """Restore the state of a `PolicyTrainer` when training begins, and average the weights after every step."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._epoch_has_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_has_ended = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.update()


class PolicyProgressCallback(ProgressCallback):
    """Show the latest losses in the progress bar instead of one line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show loss and learning rate in the bar."""
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {
                name: f"{value:.3g}"
                for name, value in logs.items()
                if isinstance(value, (int, float)) and name not in ("epoch", "grad_norm", "step", "data_wait")
            }
            self.training_bar.set_postfix(shown, refresh=False)
