"""Build the card of a checkpoint folder from its files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._files import read_json
from ..checkpoint import ADAPTER_CONFIG, CONFIG_FILE, base_of
from ..configuration.contract import Contract, of_robot
from ..configuration.crops import small_crops
from ..errors import CorruptFileError, InvalidCardError, MissingFileError
from ..families import title_of
from .card import CARD_FILE, save_card
from .card_data import CardData
from .commands import evaluation_command
from .licenses import License, license_fields, license_of_card, metadata_of_card
from .wording import PLACEHOLDER, is_hub_id

TRAINING_FILE, EVALUATION_FILE, VIDEO_FILE = "training.json", "evaluation.json", "rollout.mp4"


def write_checkpoint_card(
    folder: str | os.PathLike, repo_id: str | None = None, base: str | os.PathLike | None = None
) -> Path:
    """Write README.md (and the learning curve) into a checkpoint folder; a card that a person edited is kept.

    Args:
        folder: with config.json and processor_config.json; training.json and evaluation.json where they exist.
        repo_id: where it is published, for the examples.
        base: folder or Hub id of the checkpoint that the weights derive from, where no file here says it.

    Raises:
        MissingFileError, CorruptFileError: the folder is no checkpoint, or a file in it is not JSON.
    """
    return save_card(checkpoint_card(folder, repo_id, base), folder)


def checkpoint_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base: str | os.PathLike | None = None,
    needs_processor: bool = True,
) -> CardData:
    """Return what the card of a checkpoint folder states; see `write_checkpoint_card`."""
    folder = Path(folder)
    config = _read(folder / CONFIG_FILE, required=True)
    processor = _read(folder / "processor_config.json", required=needs_processor)
    record = _read(folder / TRAINING_FILE)
    evaluation = _read(folder / EVALUATION_FILE)
    if evaluation.get("video") and not (folder / evaluation["video"]).is_file():
        evaluation |= {"video": None, "video_note": None}  # the folder was copied without it
    parameters, is_adapter = _parameters(folder), (folder / ADAPTER_CONFIG).is_file()
    card = describe_policy(
        config, processor, parameters, record=record, evaluation=evaluation, repo_id=repo_id, is_adapter=is_adapter
    )
    text = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else ""
    stated = metadata_of_card(text)
    trained_from = (record.get("recipe") or {}).get("base")
    base = base_of(folder)[0] if is_adapter else trained_from or base or stated.get("base_model")
    if base is not None and (os.path.isdir(base) or not is_hub_id(str(base))):
        base = Path(base)
    card.base_model = base if isinstance(base, str) and base != repo_id else None
    kept = license_of_card(text)
    if kept is not None and kept.id != card.license:  # the card that is replaced knew it
        fields = license_fields(card.model_type, card.policy_name, parameters, True)
        fields = fields if fields.get("license") == kept.id else license_fields("", "", 0, True, kept)
        return replace(card, **fields)
    from_scratch = base is None and bool(record.get("recipe"))
    derived = True if base is not None else False if from_scratch else None
    is_other = isinstance(base, Path) and base.is_dir() and base.resolve() != folder.resolve()
    found = _license_of_folder(base) if is_other else None
    return replace(card, **license_fields(card.model_type, card.policy_name, parameters, derived, found))


def _license_of_folder(folder: Path) -> License | None:
    """Return the licence of a checkpoint on this computer; None where nothing says it."""
    stated = license_of_card((folder / CARD_FILE).read_text("utf-8") if (folder / CARD_FILE).is_file() else None)
    if stated is not None or "format_version" not in _read(folder / CONFIG_FILE):  # another project's, say
        return stated
    card = checkpoint_card(folder, needs_processor=False)
    return License(card.license, card.license_name, card.license_link)


def describe_policy(
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    parameters: int,
    record: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    is_adapter: bool = False,
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
        is_adapter: whether its weights are those of an adapter.
    """
    record = record or {}
    for name in ("model_type", "input_features", "output_features"):
        if name not in config:
            raise InvalidCardError(f"config.json has no {name}, so it is not that of a policy of this library.")
    features = {name: config[name] for name in ("input_features", "output_features")}
    fields = {**processor, **features}
    robots = {
        name: Contract.from_fields(of_robot(fields, name)) for name in processor.get("embodiment_features") or ()
    }
    measured = (evaluation or {}).get("embodiment")
    first = measured if measured in robots else fields.get("embodiment") or next(iter(robots), None)
    contract = robots[first] if robots else Contract.from_fields(fields)
    if evaluation:
        absent = [name for name in ("environment", "episodes", "success_rate", "seeds") if not evaluation.get(name)]
        if absent and absent != ["success_rate"]:
            raise InvalidCardError(f"evaluation.json lacks {', '.join(absent)}. Measure again: manipulators eval …")
        source = repo_id or PLACEHOLDER
        evaluation = {
            **evaluation,
            "command": evaluation_command(evaluation, source, config, contract.reads_instruction),
        }
    parts = {kind: config[kind] for kind in ("backbone", "action_head") if isinstance(config.get(kind), Mapping)}
    return CardData(
        policy_name=title_of(config["model_type"]),
        model_type=config["model_type"],
        parameters=parameters,
        inputs=contract.inputs,
        outputs=contract.outputs,
        embodiment=contract.embodiment,
        robots=robots,
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
        is_adapter=is_adapter,
        limits=small_crops(config),
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
