"""A checkpoint that does not fit is refused by name, tensor by tensor, at every door."""

import functools
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from manipulators import AutoPolicy, PolicyPipeline
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    UnknownConfigFieldError,
    WeightsMismatchError,
    WeightsValueError,
)

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))["CASES"]
DOORS = {
    "class": lambda folder, policy, **kwargs: type(policy).from_pretrained(folder, **kwargs),
    "AutoPolicy": lambda folder, policy, **kwargs: AutoPolicy.from_pretrained(folder, **kwargs),
    "AutoModel": lambda folder, policy, **kwargs: AutoModel.from_pretrained(folder, **kwargs),
    "PolicyPipeline": lambda folder, policy, **kwargs: PolicyPipeline.from_pretrained(folder, **kwargs).policy,
}
COMPLETE = [name for name, case in CASES.items() if case.complete]
# Every policy through its class, and one policy through each other door.
ENTRANCES = [(name, "class") for name in COMPLETE] + [(COMPLETE[0], door) for door in DOORS if door != "class"]


@pytest.fixture(params=COMPLETE)
def saved(request, checkpoint, tmp_path):
    """A policy and the folder that holds it."""
    policy, folder = checkpoint(CASES[request.param])
    return policy, shutil.copytree(folder, tmp_path / "saved")


@pytest.fixture(params=ENTRANCES, ids="-".join)
def entrance(request, checkpoint, tmp_path):
    """A policy, the folder that holds it, and a function that loads a folder by one door."""
    name, door = request.param
    policy, folder = checkpoint(CASES[name])
    return policy, shutil.copytree(folder, tmp_path / "saved"), functools.partial(DOORS[door], policy=policy)


def write(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check_refused(load, folder, broken):
    """What is reported is what was broken, name by name."""
    write(folder, broken.found)
    with pytest.raises(WeightsMismatchError) as caught:
        load(folder)
    broken.check(caught.value)


def test_every_tensor_is_needed(saved, break_all):
    """Each is broken in every way, while its neighbours are broken in the others."""
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(policy.state_dict())
    for turn in range(4):
        check_refused(type(policy).from_pretrained, folder, break_all(weights, turn))


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_strict(saved, break_all, door):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    check_refused(functools.partial(DOORS[door], policy=policy), folder, break_all(weights))


def spoiled(weights, value, every=3):
    """Return weights of which some tensors hold one NaN, or one infinity, and the names of those."""
    names = sorted(name for name, tensor in weights.items() if tensor.is_floating_point())[::every]
    changed = {name: weights[name].clone() for name in names}
    for tensor in changed.values():
        tensor.view(-1)[-1] = value
    return weights | changed, names


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_no_number_is_found_at_every_door(entrance, value):
    _, folder, load = entrance
    weights, names = spoiled(load_file(folder / "model.safetensors"), value)
    write(folder, weights)
    with pytest.raises(WeightsValueError, match="NaN or infinity") as caught:
        load(folder)
    assert caught.value.not_finite == names


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_kind_are_not_cast(entrance, kind):
    _, folder, load = entrance
    weights = load_file(folder / "model.safetensors")
    names = sorted(name for name, tensor in weights.items() if tensor.is_floating_point())[::5]
    write(folder, weights | {name: weights[name].to(kind) for name in names})
    with pytest.raises(WeightsValueError, match="not that of weights") as caught:
        load(folder)
    assert [name for name, _ in caught.value.of_type] == names


def test_state_dict_with_values_that_are_no_numbers(saved):
    policy, folder = saved
    weights, names = spoiled(load_file(folder / "model.safetensors"), float("nan"), every=1)
    with pytest.raises(WeightsValueError) as caught:
        type(policy).from_pretrained(None, config=policy.config, state_dict=weights)
    assert caught.value.not_finite == names
    halves = {name: tensor.char() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    with pytest.raises(WeightsValueError, match="int8"):
        type(policy).from_pretrained(None, config=policy.config, state_dict=halves)


def test_extra_tensor(entrance):
    _, folder, load = entrance
    weights = load_file(folder / "model.safetensors")
    # Names that transformers ignores in some of its own models are no exception.
    strays = ["bn1.num_batches_tracked", "position_ids", "rotary_emb.inv_freq", "stray.weight"]
    write(folder, weights | {name: torch.zeros(2) for name in strays})
    with pytest.raises(WeightsMismatchError, match=r"[\s\S]*".join(strays)) as caught:
        load(folder)
    assert (caught.value.missing, caught.value.unexpected, caught.value.mismatched) == ([], strays, [])


def test_mismatch_names_what_was_found_and_expected(saved):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    name, value = next(iter(weights.items()))
    write(folder, weights | {name: torch.zeros(7, 3)})
    with pytest.raises(WeightsMismatchError) as caught:
        type(policy).from_pretrained(folder)
    assert caught.value.mismatched == [(name, (7, 3), tuple(value.shape))]
    assert f"{name}: found (7, 3), expected {tuple(value.shape)}" in str(caught.value)


def test_renamed_tensor_shows_its_nearest_name(saved):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name + "s"] = weights.pop(name)
    write(folder, weights)
    with pytest.raises(WeightsMismatchError, match=f"{name} \\(nearest on the other side: {name}s\\)"):
        type(policy).from_pretrained(folder)


def test_allow_partial_fills_only_what_is_missing(entrance):
    _, folder, load = entrance
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(weights)[0]
    write(folder, {name: value for name, value in weights.items() if name != dropped} | {"stray": torch.zeros(1)})
    loaded = load(folder, allow_partial=True).state_dict()
    assert torch.isfinite(loaded[dropped]).all()
    for name in weights.keys() - {dropped}:
        assert torch.equal(loaded[name], weights[name]), name


@pytest.mark.parametrize("arguments", [{"use_safetensors": True}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_transformers_own_arguments_are_accepted(entrance, arguments):
    policy, folder, load = entrance
    loaded = load(folder, **arguments)
    assert torch.equal(next(iter(loaded.parameters())), next(iter(policy.parameters())))


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def test_truncated_file(entrance):
    _, folder, load = entrance
    path = folder / "model.safetensors"
    cut(path, path.stat().st_size // 2)
    with pytest.raises(CorruptFileError):
        load(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_file_truncated_elsewhere(checkpoint, tmp_path, length):
    policy, folder = checkpoint(CASES[COMPLETE[0]])
    cut(shutil.copytree(folder, tmp_path / "saved") / "model.safetensors", length)
    with pytest.raises(CorruptFileError):
        type(policy).from_pretrained(tmp_path / "saved")


def test_no_weights(entrance):
    _, folder, load = entrance
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        load(folder)


def test_pickled_weights_are_never_read(entrance):
    policy, folder, load = entrance
    (folder / "model.safetensors").unlink()
    torch.save(policy.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin"):
        load(folder)


def test_other_formats_cannot_be_asked_for(entrance):
    policy, folder, load = entrance
    torch.save(policy.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        load(folder, use_safetensors=False)


def test_unknown_argument(entrance):
    _, folder, load = entrance
    with pytest.raises(UnknownConfigFieldError, match=r"'n_obs_step'\. Did you mean 'n_obs_steps'"):
        load(folder, n_obs_step=1)


# --- shards -----------------------------------------------------------------------------------------------


def save_in_shards(policy, folder):
    (folder / "model.safetensors").unlink()
    policy.save_pretrained(folder, max_shard_size=30_000)
    assert len(list(folder.glob("*-of-*"))) > 2


def test_missing_shard(entrance):
    policy, folder, load = entrance
    save_in_shards(policy, folder)
    lost = sorted(folder.glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(MissingFileError, match=lost.name):
        load(folder)


def test_truncated_shard(entrance):
    policy, folder, load = entrance
    save_in_shards(policy, folder)
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptFileError):
        load(folder)


def test_corrupt_index(entrance):
    policy, folder, load = entrance
    save_in_shards(policy, folder)
    for text in ("{", "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CorruptFileError, match="index"):
            load(folder)


def test_missing_index(entrance):
    policy, folder, load = entrance
    save_in_shards(policy, folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingFileError, match="-of-"):
        load(folder)


def test_tensor_missing_from_its_shard(entrance):
    policy, folder, load = entrance
    save_in_shards(policy, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = sorted(index["weight_map"].items())[5]
    weights = load_file(folder / file)
    del weights[name]
    save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(WeightsMismatchError, match=name):
        load(folder)


def test_config_without_the_weights_it_describes(entrance, tmp_path):
    """An override of a width is a contradiction with the weights, not a way to half-load them."""
    _, folder, load = entrance
    shutil.copytree(folder, tmp_path / "wider")
    config = json.loads((tmp_path / "wider" / "config.json").read_text())
    config["output_features"]["action"]["shape"] = [9]
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    # A policy that pads its actions says that they no longer fit.
    with pytest.raises((WeightsMismatchError, InvalidConfigError), match=r"expected|cannot be widened"):
        load(tmp_path / "wider")
