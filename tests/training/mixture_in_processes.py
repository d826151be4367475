"""Train a tiny ACT on a mixture in the processes that torchrun starts, with workers: whole, and cut and resumed.

    python mixture_in_processes.py FOLDER OUTPUT

Every rank writes OUTPUT/seen_<rank>.json: of each run (dataset, sample) of every batch, and its log.
"""

import json
import sys
from pathlib import Path

import torch

from manipulators import (
    ACTConfig,
    ACTPolicy,
    LeRobotDataset,
    MixtureDataset,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
)

UNREPEATABLE = ("data_wait", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


def run(mixture, output, steps, resume=False):
    """Train up to a step; return which samples were read, and what was logged."""
    torch.manual_seed(0)
    sizes = {"chunk_size": 4, "dim_model": 16, "n_heads": 2, "dim_feedforward": 16, "n_encoder_layers": 1}
    config = ACTConfig.for_dataset(mixture, use_vae=False, dropout=0.0, **sizes)
    processor = PolicyProcessor.from_config(config, **mixture.processor_fields(config))
    arguments = PolicyTrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=4,
        logging_steps=3,
        dataloader_num_workers=2,
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = PolicyTrainer(ACTPolicy(config), arguments, processor, train_dataset=mixture)
    seen, plain = [], trainer.training_step

    def listening(model, batch, *rest):
        states = (batch["state"][:, 0] * 1000).round().int().tolist()
        seen.append(list(zip(batch["dataset_index"].tolist(), states, strict=True)))
        return plain(model, batch, *rest)

    trainer.training_step = listening
    trainer.train(resume_from_checkpoint=resume)
    log = [{k: v for k, v in entry.items() if k not in UNREPEATABLE} for entry in trainer.state.log_history]
    return {"seen": seen, "log": log}, trainer.args.process_index


if __name__ == "__main__":
    folder, output = sys.argv[1:]
    names = ["observation.state", "action"]
    halves = [LeRobotDataset(Path(folder, "wide"), action_horizon=4, episodes=[i], features=names) for i in (0, 1)]
    mixture = MixtureDataset(halves, [1, 1], weights_by="dataset", names=["first", "second"])
    runs = {
        "whole": run(mixture, f"{output}/whole", 8)[0],
        "cut": run(mixture, f"{output}/cut", 4)[0],
    }
    runs["resumed"], rank = run(mixture, f"{output}/cut", 8, resume=True)
    Path(output, f"seen_{rank}.json").write_text(json.dumps(runs))
