"""Build the card of a checkpoint folder from its files."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import read_json
from ..configuration.contract import Contract
from ..errors import CorruptFileError, InvalidCardError, MissingFileError
from ..families import title_of
from .card import save_card
from .card_data import CardData
from .wording import is_hub_id

TRAINING_FILE, EVALUATION_FILE, VIDEO_FILE = "training.json", "evaluation.json", "rollout.mp4"
BASE_FILE = "adapter_base.json"  # written by modeling/adapters.py


def write_checkpoint_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Write README.md (and the learning curve) into a checkpoint folder; a card that a person edited is kept.

    Args:
        folder: with config.json and processor_config.json; training.json and evaluation.json where they exist.
        repo_id: where it is published, for the examples.

    Raises:
        MissingFileError, CorruptFileError: the folder is no checkpoint, or a file in it is not JSON.
    """
    return save_card(checkpoint_card(folder, repo_id), folder)


def checkpoint_card(folder: str | os.PathLike, repo_id: str | None = None) -> CardData:
    """Return what the card of a checkpoint folder states; see `write_checkpoint_card`."""
    folder = Path(folder)
    config = _read(folder / "config.json", required=True)
    processor = _read(folder / "processor_config.json", required=True)
    record = _read(folder / TRAINING_FILE)
    evaluation = _read(folder / EVALUATION_FILE)
    if evaluation.get("video") and not (folder / evaluation["video"]).is_file():
        evaluation |= {"video": None, "video_note": None}  # the folder was copied without it
    base = _read(folder / BASE_FILE).get("base")  # of an adapter
    return describe_policy(
        config,
        processor,
        _parameters(folder),
        record=record,
        evaluation=evaluation,
        repo_id=repo_id,
        base_model=base if is_hub_id(base) else None,
    )


def describe_policy(
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    parameters: int,
    record: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
) -> CardData:
    """Return what a card states about a policy, from its config, processor and records as plain values.

    Args:
        config: `policy.config.to_dict()`.
        processor: `processor.to_dict()`; empty when the policy is published without one.
        parameters: numbers in its weights.
        record: content of training.json.
        evaluation: content of evaluation.json.
        repo_id: where it is published.
        base_model: what it was fine-tuned from.
    """
    record = record or {}
    for name in ("model_type", "input_features", "output_features"):
        if name not in config:
            raise InvalidCardError(f"config.json has no {name}, so it is not that of a policy of this library.")
    if evaluation:
        absent = [name for name in ("environment", "episodes", "success_rate", "seeds") if not evaluation.get(name)]
        if absent and absent != ["success_rate"]:
            raise InvalidCardError(f"evaluation.json lacks {', '.join(absent)}. Measure again: manipulators eval …")
        seed = evaluation["seeds"][0]
        environment = shlex.quote(evaluation["environment"])  # options hold characters that shells read
        command = f"manipulators eval {repo_id or 'path/to/this/folder'} --env {environment}"
        command += f" --episodes {evaluation['episodes']} --seed {seed}"
        for option in ("num_envs", "horizon"):
            if evaluation.get(option):
                command += f" --{option.replace('_', '-')} {evaluation[option]}"
        evaluation = {**evaluation, "command": command}
    parts = {kind: config[kind] for kind in ("backbone", "action_head") if isinstance(config.get(kind), Mapping)}
    features = {name: config[name] for name in ("input_features", "output_features")}
    contract = Contract.from_fields({**processor, **features})
    return CardData(
        policy_name=title_of(config["model_type"]),
        model_type=config["model_type"],
        parameters=parameters,
        inputs=contract.inputs,
        outputs=contract.outputs,
        embodiment=contract.embodiment,
        repo_id=repo_id,
        action_horizon=config.get("chunk_size") or config.get("horizon") or config.get("action_horizon"),
        n_action_steps=config.get("n_action_steps"),
        n_obs_steps=config.get("n_obs_steps", 1),
        control_rate_hz=record.get("control_rate_hz"),
        instruction=contract.reads_instruction and ((evaluation or {}).get("task") or True),
        dataset=record.get("dataset"),
        training=record.get("training"),
        log_history=record.get("log_history", ()),
        evaluation=evaluation or None,
        versions=record.get("versions", {}),
        base_model=base_model,
        components={kind: str(part["type"]) for kind, part in parts.items() if part.get("type")},
    )


def _parameters(folder: Path) -> int:
    """Count the numbers in the weights' headers; nothing is loaded."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in sorted(folder.glob("*model*.safetensors")):  # not what a Trainer checkpoint holds beside them
        try:
            with safe_open(path, framework="np") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise CorruptFileError(path, "safetensors file", error) from error
    return total


def _read(path: Path, required: bool = False) -> dict[str, Any]:
    if path.is_file():
        return read_json(path)
    if required:
        held = ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise MissingFileError(f"{path.parent} holds no {path.name}; it holds {held or 'nothing'}.")
    return {}
