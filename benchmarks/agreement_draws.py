"""Random configurations for agreement.py, each from its seed: LeRobot's config.json, and what goes in.

A configuration is plain data, so that this module needs no LeRobot. A policy joins by its row in `DRAWS`: a function
of a random generator that returns what is peculiar to it, fields of LeRobot's config under their published names, and
now and then an option that this library refuses by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from networks import PATCH, TINY_TEXT, TINY_VISION

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
WORDS = ("pick", "up", "the", "red", "cube", "and", "put_it", "in", "a", "box", "slowly", "\n")
Draws = dict[str, torch.Tensor]  # random numbers, under the names by which our policies take them
RARELY = 0.04  # how often an option is drawn that is refused by name


@dataclass
class Configuration:
    """Describe one configuration of a policy.

    Args:
        policy: LeRobot's name of it.
        seed: what it was drawn from.
        config: LeRobot's config.json.
        rare: the option that this library may refuse by name; None in most.
        normalize_only: the observations that LeRobot's processor normalises; None is all of them.
        sizes: of networks that LeRobot's config only names: `text`, `expert` and `vision`.
        constant: per feature the dimension that never moves, None where all move. It keeps its recorded value: LeRobot
            divides what deviates from it by 1e-8, this library does not.
        padding: steps at the chunk's end that lie beyond the episode, one number per sample of a batch.
        steps: how many actions are asked for, one after another.
    """

    policy: str
    seed: int
    config: dict[str, Any]
    rare: str | None = None
    normalize_only: list[str] | None = None
    sizes: dict[str, dict[str, Any]] | None = None
    constant: dict[str, int | None] = field(default_factory=dict)
    padding: list[int] = field(default_factory=list)
    steps: int = 1

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """All that goes in and out, under its name, with `type` and `shape`; without what nobody reads."""
        features = self.config["input_features"] | self.config["output_features"]
        return {name: feature for name, feature in features.items() if name != "observation.velocity"}

    @property
    def observed(self) -> list[str]:
        """The features that an observation holds."""
        return [name for name in self.features if name != ACTION and "empty_camera" not in name]

    @property
    def history(self) -> int:
        """Observations that the policy looks at."""
        return self.config.get("n_obs_steps", 1)

    @property
    def horizon(self) -> int:
        """Actions of a chunk in training."""
        return self.config.get("chunk_size", self.config.get("horizon"))

    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Return random statistics of every feature, in the order that real ones have."""
        generator = np.random.default_rng([self.seed, 1])
        statistics = {}
        for name, feature in (self.config["input_features"] | self.config["output_features"]).items():
            shape = (feature["shape"][0], 1, 1) if feature["type"] == "VISUAL" else tuple(feature["shape"])
            scale = 0.2 if feature["type"] == "VISUAL" else 10 ** generator.uniform(-1.5, 1.5)
            mean = generator.normal(0.5 if feature["type"] == "VISUAL" else 0, scale, shape)
            std = scale * generator.uniform(0.5, 1.5, shape)
            below, above = (np.sort(scale * generator.uniform(0.1, 3, (3, *shape)), axis=0) for _ in range(2))
            if (still := self.constant.get(name)) is not None:
                std[still] = below[:, still] = above[:, still] = 0
            q10, q01, low = mean - below
            q90, q99, high = mean + above
            values = {"mean": mean, "std": std, "min": low, "max": high, "q01": q01, "q99": q99}
            values |= {"q10": q10, "q90": q90}
            statistics[name] = {which: value.astype(np.float32) for which, value in values.items()}
        return statistics

    def values(self, name: str, leading: tuple[int, ...], draw: int) -> np.ndarray:
        """Return raw values (*leading, …) of a feature: pictures as bytes (…, h, w, c), vectors in robot units.

        Args:
            name: the feature's.
            leading: dimensions before the feature's own.
            draw: another number, other values.
        """
        generator = np.random.default_rng([self.seed, 2, draw, *name.encode()])
        feature = self.features[name]
        if feature["type"] == "VISUAL":
            channels, height, width = feature["shape"]
            return generator.integers(0, 256, (*leading, height, width, channels), dtype=np.uint8)
        statistics = self.statistics()[name]
        x = statistics["mean"] + statistics["std"] * generator.normal(size=(*leading, *feature["shape"]))
        return x.astype(np.float32)

    def labels(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions (b, h, a) of a batch and `action_is_pad` (b, h); padding repeats the last real action."""
        real = self.horizon - np.array(self.padding)[:, None]  # (b, 1)
        steps = np.minimum(np.arange(self.horizon), np.maximum(real - 1, 0))  # (b, h)
        actions = self.values(ACTION, (len(self.padding), self.horizon), draw)
        return np.take_along_axis(actions, steps[:, :, None], axis=1), np.arange(self.horizon) >= real

    def tasks(self, count: int, draw: int) -> list[str]:
        """Return instructions, some longer than a policy reads, some that end with a line break."""
        choose = random.Random(f"tasks {self.seed} {draw}")
        first = WORDS[:-1]  # nothing but a line break is no instruction, and refused here
        words = ([choose.choice(first), *choose.choices(WORDS, k=choose.randint(0, 13))] for _ in range(count))
        return [" ".join(chosen) for chosen in words]


def draw(policy: str, seed: int) -> Configuration:
    """Return the configuration of a policy that a seed stands for, always the same."""
    choose = random.Random(f"{policy} {seed}")
    drawn = DRAWS[policy](choose)
    config = {"type": policy, "device": "cpu", "push_to_hub": False} | drawn.pop("config")
    configuration = Configuration(policy, seed, config, **drawn)
    if configuration.rare is None and choose.random() < RARELY:
        configuration.rare = "normalize_observation_keys"
        configuration.normalize_only = configuration.observed[:1]
    for name, feature in configuration.features.items():
        still = feature["type"] != "VISUAL" and choose.random() < 0.15
        configuration.constant[name] = choose.randrange(feature["shape"][0]) if still else None
    if config.get("use_relative_actions"):
        configuration.constant[ACTION] = None  # the statistics are those of differences to a state that moves
    batch = choose.randint(1, 3)
    configuration.padding = [choose.choice((0, 0, 1, configuration.horizon // 2)) for _ in range(batch)]
    if batch > 1 and choose.random() < 0.2:
        configuration.padding[0] = configuration.horizon  # nothing of a sample is left
    configuration.steps = choose.randint(2, 7)
    return configuration


def in_type(values: Any, dtype: torch.dtype) -> Any:
    """Return a batch with its floating-point numbers in that type."""
    if isinstance(values, dict):
        return {name: in_type(value, dtype) for name, value in values.items()}
    if isinstance(values, list):
        return [in_type(value, dtype) for value in values]
    return values.to(dtype) if isinstance(values, torch.Tensor) and values.is_floating_point() else values


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a parameter's gradient, zero where none arrived."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# --- what all have ----------------------------------------------------------------------------------------


def _features(
    choose: random.Random, sizes: list[tuple[int, int]], state: int | None, environment: int | None, action: int
) -> dict[str, Any]:
    names = choose.sample(("top", "wrist", "cam_high", "a.b", "left"), len(sizes))
    inputs: dict[str, Any] = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]}
        for name, size in zip(names, sizes, strict=True)
    }
    if state:
        inputs[STATE] = {"type": "STATE", "shape": [state]}
    if environment:
        inputs[ENVIRONMENT] = {"type": "ENV", "shape": [environment]}
    if choose.random() < 0.1:  # listed among the inputs, and read by nobody
        inputs["observation.velocity"] = {"type": "STATE", "shape": [2]}
    names = list(inputs)
    choose.shuffle(names)
    return {
        "input_features": {name: inputs[name] for name in names},
        "output_features": {ACTION: {"type": "ACTION", "shape": [action]}},
    }


def _modes(choose: random.Random, visual: tuple[str, ...] = MODES) -> dict[str, str]:
    modes = {"VISUAL": choose.choice(visual)} | {kind: choose.choice(MODES) for kind in ("STATE", "ENV", "ACTION")}
    if choose.random() < 0.3:
        del modes["ENV"]  # as LeRobot's own defaults leave it out
    return modes


def _sides(choose: random.Random, smallest: int, largest: int) -> tuple[int, int]:
    return choose.randint(smallest, largest), choose.randint(smallest, largest)


def _resnet(choose: random.Random) -> str:
    return choose.choices(("resnet18", "resnet34", "resnet50"), (8, 1, 1))[0]


# --- policies ---------------------------------------------------------------------------------------------


def _act(choose: random.Random) -> dict[str, Any]:
    """ACT: cameras of any sizes, or object states alone, a VAE, ensembling, pre- and post-norm."""
    cameras = [_sides(choose, 40, 100) for _ in range(choose.choice((0, 1, 1, 2, 2, 3)))]
    if len(cameras) > 1 and choose.random() < 0.5:
        cameras = cameras[:1] * len(cameras)
    environment = choose.randint(1, 6) if not cameras or choose.random() < 0.3 else None
    state = choose.randint(1, 8) if choose.random() < 0.85 else None
    chunk = choose.randint(1, 12)
    ensembles = choose.random() < 0.3
    heads = choose.choice((1, 2, 4))
    config = {
        "n_obs_steps": 1,
        "chunk_size": chunk,
        "n_action_steps": 1 if ensembles else choose.randint(1, chunk),
        "temporal_ensemble_coeff": choose.choice((0.01, 0.0, -0.1, 0.5)) if ensembles else None,
        "normalization_mapping": _modes(choose),
        "vision_backbone": _resnet(choose),
        "pretrained_backbone_weights": None,
        "pre_norm": choose.random() < 0.4,
        "dim_model": 8 * heads * choose.randint(1, 3),
        "n_heads": heads,
        "dim_feedforward": choose.choice((16, 24, 40)),
        "feedforward_activation": choose.choice(("relu", "gelu")),
        "n_encoder_layers": choose.randint(1, 3),
        "n_decoder_layers": choose.randint(1, 2),
        "use_vae": choose.random() < 0.6,
        "latent_dim": choose.randint(1, 8),
        "n_vae_encoder_layers": choose.randint(1, 2),
        "dropout": 0.0,
        "kl_weight": choose.choice((10.0, 1.0, 0.0, 0.3)),
    }
    config |= _features(choose, cameras, state, environment, choose.randint(1, 7))
    rare = None
    if cameras and choose.random() < RARELY:
        rare = "replace_final_stride_with_dilation"
        config |= {rare: True, "vision_backbone": "resnet50"}
    return {"config": config, "rare": rare}


def _diffusion(choose: random.Random) -> dict[str, Any]:
    """Diffusion Policy: history, crops, both samplers and their schedules, one or several encoders, widths."""
    size = _sides(choose, 48, 100)
    cameras = [size] * choose.choice((0, 1, 1, 2, 2))
    environment = choose.randint(1, 6) if not cameras or choose.random() < 0.3 else None
    levels = choose.randint(1, 3)
    history, horizon = choose.randint(1, 3), 2**levels * choose.randint(1, 3)
    history = min(history, horizon)
    groups = choose.choice((4, 8))
    timesteps = choose.randint(2, 16)
    resizes, crops = choose.random() < 0.35, choose.random() < 0.6
    resize = _sides(choose, 44, 90) if resizes else None
    crop = _sides(choose, 34, min(size)) if crops and not resizes else None
    config = {
        "n_obs_steps": history,
        "horizon": horizon,
        "n_action_steps": choose.randint(1, horizon - history + 1),
        "normalization_mapping": _modes(choose),
        "vision_backbone": _resnet(choose),
        "pretrained_backbone_weights": None,
        "resize_shape": resize and list(resize),
        "crop_ratio": choose.choice((0.8, 0.9, 0.95)) if resizes and crops else 1.0,
        "crop_shape": crop and list(crop),
        "crop_is_random": choose.random() < 0.6,
        "use_group_norm": choose.random() < 0.6,
        "spatial_softmax_num_keypoints": choose.choice((1, 4, 9, 32)),
        "use_separate_rgb_encoder_per_camera": choose.random() < 0.5,
        "down_dims": sorted(8 * choose.randint(1, 4) for _ in range(levels)),
        "kernel_size": choose.choice((1, 3, 5)),
        "n_groups": groups,
        "diffusion_step_embed_dim": choose.choice((4, 16, 30)),
        "use_film_scale_modulation": choose.random() < 0.6,
        "gradient_checkpointing": choose.random() < 0.2,
        "noise_scheduler_type": choose.choice(("DDPM", "DDIM")),
        "num_train_timesteps": timesteps,
        "beta_schedule": choose.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "beta_start": choose.choice((0.0001, 0.001)),
        "beta_end": choose.choice((0.02, 0.2)),
        "prediction_type": choose.choice(("epsilon", "sample")),
        "clip_sample": choose.random() < 0.7,
        "clip_sample_range": choose.choice((1.0, 1.5)),
        "num_inference_steps": choose.choice((None, choose.randint(1, timesteps))),
        "do_mask_loss_for_padding": choose.random() < 0.5,
    }
    return {"config": config | _features(choose, cameras, choose.randint(1, 8), environment, choose.randint(1, 7))}


def _pi0(choose: random.Random) -> dict[str, Any]:
    """π0: pictures to be padded, cameras that are not there, widths, joints as differences, frozen parts."""
    side = PATCH * choose.randint(1, 3)
    cameras = [_sides(choose, 14, 70) for _ in range(choose.randint(1, 3))]
    chunk, state, action = choose.randint(1, 10), choose.randint(1, 8), choose.randint(1, 7)
    relative = choose.random() < 0.3
    state = max(state, action) if relative else state
    names = [f"{choose.choice(('joint', 'gripper', 'Gripper.pos'))}_{i}" for i in range(action)]
    config = {
        "n_obs_steps": 1,
        "chunk_size": chunk,
        # LeRobot adds the state at which an action leaves the queue, not that in which the chunk was predicted.
        "n_action_steps": 1 if relative else choose.randint(1, chunk),
        "max_state_dim": state + choose.randint(0, 4),
        "max_action_dim": action + choose.randint(0, 4),
        "num_inference_steps": choose.randint(1, 6),
        "time_sampling_beta_alpha": choose.choice((1.5, 1.0)),
        "min_period": choose.choice((4e-3, 1e-2)),
        "max_period": choose.choice((4.0, 2.0)),
        "use_relative_actions": relative,
        "relative_exclude_joints": choose.choice((["gripper"], [], ["gripper", "joint_0"])),
        "action_feature_names": choose.choice((names, None)),
        "image_resolution": [side, side],
        "empty_cameras": choose.choice((0, 0, 1, 2)),
        "normalization_mapping": _modes(choose, ("IDENTITY", "IDENTITY", "IDENTITY", "MEAN_STD")),
        "gradient_checkpointing": choose.random() < 0.2,
        "freeze_vision_encoder": choose.random() < 0.2,
        "train_expert_only": choose.random() < 0.2,
        "tokenizer_max_length": choose.choice((4, 9, 24)),
    }
    config |= _features(choose, cameras, state, None, action)
    rare = None
    if choose.random() < 2 * RARELY:
        rare, value = choose.choice((("n_obs_steps", 2), ("rtc_config", {"enabled": True})))
        config[rare] = value
    return {"config": config, "rare": rare, "sizes": _sizes(choose, side)}


def _sizes(choose: random.Random, side: int) -> dict[str, dict[str, Any]]:
    """Return the sizes of a small PaliGemma and its expert for pictures of that side."""
    shared = {
        "num_hidden_layers": choose.randint(1, 3),
        "num_attention_heads": 8,  # as LeRobot's training assumes
        "num_key_value_heads": choose.choice((1, 2, 8)),
        "head_dim": choose.choice((8, 16)),
        "vocab_size": 64,
    }
    return {
        "text": TINY_TEXT | shared | {"hidden_size": 8 * choose.randint(2, 6), "intermediate_size": 40},
        "expert": TINY_TEXT | shared | {"hidden_size": 8 * choose.randint(2, 6), "intermediate_size": 24},
        "vision": TINY_VISION | {"image_size": side, "intermediate_size": 4304},
    }


DRAWS: dict[str, Callable[[random.Random], dict[str, Any]]] = {"act": _act, "diffusion": _diffusion, "pi0": _pi0}
