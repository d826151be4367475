"""Train a tiny ACT on a mixture in the processes that torchrun starts, with workers, and write which samples it read.

    python mixture_in_processes.py FOLDER OUTPUT STEPS [resume]

Every rank writes OUTPUT/seen_<rank>.json: (dataset, sample) of every batch, and its log.
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

if __name__ == "__main__":
    folder, output, steps, *resume = sys.argv[1:]
    inputs = ["observation.state", "action"]
    wide, narrow = Path(folder, "wide"), Path(folder, "wide")
    halves = [
        LeRobotDataset(root, action_horizon=4, episodes=[i], features=inputs) for i, root in enumerate((wide, narrow))
    ]
    mixture = MixtureDataset(halves, [1, 1], weights_by="dataset", names=["first", "second"])
    torch.manual_seed(0)
    config = ACTConfig.for_dataset(
        mixture,
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_vae=False,
        dropout=0.0,
    )
    processor = PolicyProcessor.from_config(config, **mixture.processor_fields(config))
    arguments = PolicyTrainingArguments(
        output,
        max_steps=int(steps),
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
        states = (batch["state"] * 1000).round().int().tolist()
        seen.append([[int(i), state] for i, state in zip(batch["dataset_index"], states, strict=True)])
        return plain(model, batch, *rest)

    trainer.training_step = listening
    trainer.train(resume_from_checkpoint=bool(resume))
    kept = ("data_wait", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    log = [{k: v for k, v in entry.items() if k not in kept} for entry in trainer.state.log_history]
    rank = trainer.args.process_index
    Path(output, f"seen_{rank}.json").write_text(json.dumps({"seen": seen, "log": log}))
