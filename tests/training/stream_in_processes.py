"""Train a tiny ACT on a stream, in as many processes as torchrun starts.

    python stream_in_processes.py DATASET OUTPUT

Every process writes the numbers of the samples it was given to OUTPUT/<rank>.json.
"""

import json
import sys
from pathlib import Path

import torch

from manipulators import ACTConfig, ACTPolicy, PolicyProcessor, PolicyTrainer, StreamingLeRobotDataset
from manipulators import PolicyTrainingArguments as Arguments
from manipulators.training.collator import PolicyCollator

FIELDS = {"chunk_size": 4, "dim_model": 16, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1}
COMMON = {"learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}


class Noting:
    """Collate samples, and keep their numbers."""

    def __init__(self, processor):
        self.collate, self.seen = PolicyCollator(processor), []

    def __call__(self, samples):
        self.seen.append([int(sample["index"]) for sample in samples])
        return self.collate(samples)


def build(source, output, stream=None, trainer=PolicyTrainer, arguments=Arguments, **changed):
    """Return a trainer on a stream of `source`, and its collator."""
    dataset = StreamingLeRobotDataset(source, action_horizon=4, **{"shuffle_buffer": 8, **(stream or {})})
    torch.manual_seed(0)
    config = ACTConfig.for_dataset(dataset, **FIELDS, use_vae=False)
    processor = PolicyProcessor.from_config(config, dataset.statistics)
    collator = Noting(processor)
    values = COMMON | {"max_steps": 4, "per_device_train_batch_size": 4} | changed
    parts = {"processor": processor} if trainer is PolicyTrainer else {}
    policy, arguments = ACTPolicy(config), arguments(str(output), **values)
    return trainer(policy, arguments, train_dataset=dataset, data_collator=collator, **parts), collator


if __name__ == "__main__":
    source, output = sys.argv[1:]
    trainer, collator = build(source, output, max_steps=7)
    trainer.train()
    Path(output, f"{trainer.args.process_index}.json").write_text(json.dumps(collator.seen))
