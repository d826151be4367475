"""Success rates side by side: our ACT and LeRobot's ACT, trained on the same demonstrations, evaluated alike.

    python benchmarks/success.py --output outputs/benchmarks

Both see the same ten scripted pick-place demonstrations, sizes, number of updates, learning rate and schedule;
each is trained by its own code: ours by `PolicyTrainer`, LeRobot's by its own forward pass, processors, optimizer
preset and gradient clipping. LeRobot's result is saved as LeRobot saves it, and both are evaluated by `evaluate`
on seeds that no demonstration has.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType as TheirType
from lerobot.configs.types import PolicyFeature as TheirFeature
from lerobot.policies.act.configuration_act import ACTConfig as TheirConfig
from lerobot.policies.act.modeling_act import ACTPolicy as TheirPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, set_seed

from manipulators import (
    ACTConfig,
    ACTPolicy,
    LeRobotDataset,
    PolicyPipeline,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
    evaluate,
    record_demonstrations,
)
from manipulators.evaluation.intervals import wilson_interval

ENVIRONMENT = "metaworld/pick-place-v3"
DEMONSTRATIONS, FIRST_SEED = 10, 30_000
FEATURES = {"observation.state": (4, "STATE"), "observation.environment_state": (35, "ENV")}
ACTION_WIDTH = 4
SIZES = {
    "chunk_size": 16,
    "n_action_steps": 8,
    "dim_model": 128,
    "n_heads": 4,
    "dim_feedforward": 256,
    "n_encoder_layers": 2,
    "use_vae": False,
}
NORMALIZATION = {"STATE": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"}
BATCH, LEARNING_RATE, WARMUP = 64, 1e-3, 50


def train_ours(dataset: LeRobotDataset, seed: int, updates: int, folder: Path) -> PolicyPipeline:
    """Train with this library's trainer."""
    set_seed(seed)
    config = ACTConfig(
        **SIZES,
        input_features={name: {"type": kind, "shape": [width]} for name, (width, kind) in FEATURES.items()},
        output_features={"action": {"type": "ACTION", "shape": [ACTION_WIDTH]}},
    )
    processor = PolicyProcessor.from_config(config, dataset.statistics)
    arguments = PolicyTrainingArguments(
        str(folder / f"ours_{seed}"),
        max_steps=updates,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    policy = ACTPolicy(config)
    PolicyTrainer(policy, arguments, processor, train_dataset=dataset).train()
    return PolicyPipeline(policy, processor, device="cpu")


def train_theirs(dataset: LeRobotDataset, seed: int, updates: int, folder: Path) -> PolicyPipeline:
    """Train LeRobot's modules in the order of its training script."""
    set_seed(seed)
    config = TheirConfig(
        **SIZES,
        input_features={name: TheirFeature(TheirType[kind], (width,)) for name, (width, kind) in FEATURES.items()},
        output_features={"action": TheirFeature(TheirType.ACTION, (ACTION_WIDTH,))},
        normalization_mapping=NORMALIZATION,
        optimizer_lr=LEARNING_RATE,
        optimizer_lr_backbone=LEARNING_RATE,
        device="cpu",
        push_to_hub=False,
    )
    policy = TheirPolicy(config).train()
    statistics = {n: {k: torch.as_tensor(v) for k, v in s.items()} for n, s in dataset.statistics.items()}
    before, after = make_act_pre_post_processors(config, statistics)
    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, updates)
    batches = iter(())
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    for _ in range(updates):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        loss, _ = policy(before(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    checkpoint = folder / f"lerobot_{seed}"
    for part in (policy.eval(), before, after):
        part.save_pretrained(checkpoint)
    return PolicyPipeline.from_pretrained(checkpoint, device="cpu")


def main() -> None:
    """Train and evaluate both for every seed, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--episodes", type=int, default=50, help="evaluation episodes per training seed")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()

    sides = {"manipulators": train_ours, "LeRobot": train_theirs}
    successes: dict[str, list[int]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        record_demonstrations(ENVIRONMENT, DEMONSTRATIONS, folder / "dataset", progress=False)
        dataset = LeRobotDataset(folder / "dataset", action_horizon=SIZES["chunk_size"])
        for seed in range(arguments.seeds):
            first = FIRST_SEED + seed * arguments.episodes
            for side, train in sides.items():
                pipeline = train(dataset, seed, arguments.updates, folder)
                result = evaluate(pipeline, ENVIRONMENT, range(first, first + arguments.episodes), progress=False)
                successes[side].append(result.successes)
                print(f"seed {seed}, {side}: {result.successes} of {arguments.episodes}", flush=True)

    lines = ["| library | per training seed | all | 95 % interval |", "|---|---|---|---|"]
    episodes = arguments.seeds * arguments.episodes
    for side, counts in successes.items():
        low, high = wilson_interval(sum(counts), episodes)
        each = ", ".join(map(str, counts))
        lines.append(
            f"| {side} | {each} of {arguments.episodes} | {sum(counts) / episodes:.0%} | {low:.0%}–{high:.0%} |"
        )
    text = "\n".join(lines) + f"\n\n{arguments.updates} updates of {BATCH} samples each.\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "success.md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
