"""Train a tiny ACT with a VAE in as many processes as torchrun starts, on the same eight samples.

    python train_in_processes.py OUTPUT ACCUMULATION

Writes what was logged and the sums of the trained weights to OUTPUT/results.json.
"""

import json
import runpy
import sys
from pathlib import Path

import torch

from manipulators import PolicyTrainer, PolicyTrainingArguments
from manipulators.training.collator import PolicyCollator

tiny = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
# Episodes end in some samples, whose real steps these are.
REAL_STEPS = [4, 1, 4, 2, 3, 1, 1, 4]


def build(output, **arguments):
    """Return a trainer; the draws of the latent belong to the samples, however they are batched."""
    policy = tiny["tiny_policy"](dropout=0.0, kl_weight=3.0)
    samples = tiny["demonstrations"](8)
    for sample, steps in zip(samples, REAL_STEPS, strict=True):
        sample["action_is_pad"][steps:] = True
    processor = tiny["tiny_processor"](policy)
    collate = PolicyCollator(processor)

    def with_draws(batch):
        draws = [torch.randn(4, generator=torch.Generator().manual_seed(int(sample["index"]))) for sample in batch]
        return collate(batch) | {"noise": torch.stack(draws)}

    values = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PolicyTrainer(
        policy,
        PolicyTrainingArguments(str(output), **values | arguments),
        processor,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=with_draws,
    )


def results(trainer):
    """Return the logged losses, the loss of an evaluation and the sum of each trained tensor."""
    trainer.train()
    logged = [[entry[n] for n in ("loss", "l1", "kl")] for entry in trainer.state.log_history if "l1" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    return {
        "logged": logged,
        "evaluated": evaluated,
        "sums": [float(p.detach().sum()) for p in trainer.model.parameters()],
    }


if __name__ == "__main__":
    output, accumulation = sys.argv[1], int(sys.argv[2])
    processes = PolicyTrainingArguments(output, use_cpu=True).world_size
    trainer = build(
        output,
        per_device_train_batch_size=8 // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4,
    )
    found = results(trainer)
    if trainer.is_world_process_zero():
        Path(output, "results.json").write_text(json.dumps(found))
