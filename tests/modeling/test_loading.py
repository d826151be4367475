"""One folder holds one set of weights: what is written replaces what was there, and two are refused by name."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from manipulators import ACTPolicy, AutoPolicy, PolicyPipeline
from manipulators.checkpoint import ADAPTER_FILES, RECORDS
from manipulators.errors import ConflictingWeightsError, CorruptFileError, MissingFileError
from manipulators.modeling.loading import read_weights, removing_stale_records, weight_files
from manipulators.training.tuning import apply_tuning

# --- files ------------------------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder, name, **tensors):
    save_file({key: torch.full((2,), float(value)) for key, value in tensors.items()}, folder / name)


def write_index(folder, **weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_shards_and_an_adapter_are_found(tmp_path):
    for name in ("one", "shards", "adapter", "variant"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one", "model.safetensors", a=1)
    write(tmp_path / "shards", SHARDS[0], a=1)
    write(tmp_path / "shards", SHARDS[1], b=2)
    write_index(tmp_path / "shards", a=SHARDS[0], b=SHARDS[1])
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write(tmp_path / "variant", "model.fp16.safetensors", a=3)
    write(tmp_path / "variant", "model.safetensors", a=1)
    assert [path.name for path in weight_files(tmp_path / "one")] == ["model.safetensors"]
    assert [path.name for path in weight_files(tmp_path / "shards")] == list(SHARDS)
    assert [path.name for path in weight_files(tmp_path / "adapter")] == ["adapter_model.safetensors"]
    assert [path.name for path in weight_files(tmp_path / "variant", "fp16")] == ["model.fp16.safetensors"]
    assert {n: x.tolist() for n, x in read_weights(tmp_path / "shards").items()} == {"a": [1, 1], "b": [2, 2]}
    assert read_weights(tmp_path / "variant")["a"].tolist() == [1, 1]


def test_two_sets_are_refused_with_both_names(tmp_path):
    write(tmp_path, "model.safetensors", a=1)
    write_index(tmp_path, a="model.safetensors")
    with pytest.raises(ConflictingWeightsError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    write(tmp_path, "adapter_model.safetensors", a=1)
    with pytest.raises(ConflictingWeightsError, match=r"model\.safetensors and adapter_model\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConflictingWeightsError, match=r"model\.safetensors and adapter_config\.json"):
        weight_files(tmp_path)


def test_a_stale_index_and_no_weights(tmp_path):
    with pytest.raises(MissingFileError, match=r"holds no model\.safetensors; it holds nothing"):
        weight_files(tmp_path)
    write_index(tmp_path, a=SHARDS[0])
    with pytest.raises(MissingFileError, match=f"lacks {SHARDS[0]}, which model.safetensors.index.json names"):
        weight_files(tmp_path)
    write_index(tmp_path, a=f"../{SHARDS[0]}")
    with pytest.raises(CorruptFileError, match="is no file beside it"):
        weight_files(tmp_path)
    write_index(tmp_path)
    with pytest.raises(CorruptFileError, match="no weight_map"):
        weight_files(tmp_path)


# --- every policy -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(complete_case, build, processor_of, tmp_path):
    """A policy, its pipeline and the folder that holds them."""
    policy = build(complete_case)
    pipeline = PolicyPipeline(model=policy, processor=processor_of(policy.config), device="cpu")
    pipeline.save_pretrained(tmp_path / "saved")
    return pipeline, tmp_path / "saved"


@pytest.fixture
def tuned(saved):
    """The same policy with an adapter in every part that takes LoRA."""
    policy = AutoPolicy.from_pretrained(saved[1])
    apply_tuning(policy, {part: "lora" for part in policy.lora_targets if policy.part_modules(part)}, r=2)
    return policy.eval()


def weights_in(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith(("model", "adapter"))}


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_saving_replaces_whatever_weights_were_there(saved, tuned, tmp_path):
    policy, folder = saved[0].policy, tmp_path / "again"
    tuned.save_pretrained(folder)
    assert weights_in(folder) == set(ADAPTER_FILES)
    policy.save_pretrained(folder)  # a merged policy where its adapter was
    assert weights_in(folder) == {"model.safetensors"}
    assert same(AutoPolicy.from_pretrained(folder), policy)
    policy.save_pretrained(folder, max_shard_size=30_000)
    assert "model.safetensors.index.json" in weights_in(folder) > set() and "model.safetensors" not in weights_in(
        folder
    )
    assert same(AutoPolicy.from_pretrained(folder), policy)
    policy.save_pretrained(folder)  # the shards' index would win in other readers
    assert weights_in(folder) == {"model.safetensors"}
    policy.save_pretrained(folder, max_shard_size=30_000)
    tuned.save_pretrained(folder)
    assert weights_in(folder) == set(ADAPTER_FILES)
    assert same(AutoPolicy.from_pretrained(folder), tuned)


def test_saved_loaded_and_saved_again_the_bytes_are_the_same(saved, tuned, processor_of, tmp_path):
    tuned.save_pretrained(tmp_path / "adapter")
    processor_of(tuned.config).save_pretrained(tmp_path / "adapter")
    for first in (saved[1], tmp_path / "adapter"):
        again = tmp_path / f"{first.name}_again"
        PolicyPipeline.from_pretrained(first, device="cpu").save_pretrained(again)
        texts = {path.name: path.read_bytes() for path in first.iterdir() if path.suffix == ".json"}
        assert texts == {path.name: path.read_bytes() for path in again.iterdir() if path.suffix == ".json"}


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
def test_loading_says_nothing(saved, verbosity):
    transformers_logger, said = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    before = transformers_logger.level
    transformers_logger.addHandler(handler)
    transformers_logger.setLevel(verbosity)
    try:
        AutoPolicy.from_pretrained(saved[1])
    finally:
        transformers_logger.removeHandler(handler)
        transformers_logger.setLevel(before)
    assert said == []


def test_a_loaded_policy_does_not_change_with_its_file(saved, tmp_path):
    """As `cp other/model.safetensors .` and a full disk do to the file under a running robot."""
    pipeline, folder = saved
    path = folder / "model.safetensors"
    loaded = AutoPolicy.from_pretrained(folder)
    with open(path, "r+b") as file:
        file.write(b"\x00" * path.stat().st_size)
        file.truncate(10)
    assert same(loaded, pipeline.policy)


def test_a_folder_with_two_sets_is_refused_at_every_door(saved):
    policy, folder = saved[0].policy, saved[1]
    save_file(load_file(folder / "model.safetensors"), folder / "adapter_model.safetensors", {"format": "pt"})
    for load in (type(policy).from_pretrained, AutoPolicy.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ConflictingWeightsError, match="two sets of weights"):
            load(folder)


def test_a_variant_is_loaded_by_its_name_only(saved, tmp_path):
    pipeline, folder = saved
    halved = {name: value / 2 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.half.safetensors", {"format": "pt"})
    assert same(AutoPolicy.from_pretrained(folder), pipeline.policy)
    loaded = PolicyPipeline.from_pretrained(folder, variant="half", device="cpu").policy.state_dict()
    assert all(torch.equal(value, halved[name]) for name, value in loaded.items())


def test_the_doors_of_transformers_open_to_every_policy(saved):
    pipeline, folder = saved
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(pipeline.processor)
    assert processor.to_dict() == pipeline.processor.to_dict()
    assert same(AutoModel.from_pretrained(folder), pipeline.policy)
    assert transformers.pipeline("robotics", str(folder), device="cpu").processor.to_dict() == processor.to_dict()


def test_records_of_other_weights_do_not_survive_a_save(tiny_act, tmp_path):
    """One folder, one policy: saved again, or split into other files, it keeps its records."""
    policy = ACTPolicy(tiny_act())
    policy.save_pretrained(tmp_path)
    for name in RECORDS:
        (tmp_path / name).touch()
    for size in ("10KB", "5GB"):
        policy.save_pretrained(tmp_path, max_shard_size=size)
        assert all((tmp_path / name).is_file() for name in RECORDS)
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    with removing_stale_records(tmp_path, written=["training.json"]):
        save_file(policy.state_dict(), tmp_path / "model.safetensors")
    assert [name for name in RECORDS if (tmp_path / name).exists()] == ["training.json"]
    ACTPolicy(tiny_act()).save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in RECORDS)
