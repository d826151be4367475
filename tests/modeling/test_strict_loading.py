"""A checkpoint that does not fit is refused by name, tensor by tensor, at every door."""

import json
import shutil
from itertools import cycle

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

DOORS = {
    "class": lambda folder, policy, **kwargs: type(policy).from_pretrained(folder, **kwargs),
    "AutoPolicy": lambda folder, policy, **kwargs: AutoPolicy.from_pretrained(folder, **kwargs),
    "AutoModel": lambda folder, policy, **kwargs: AutoModel.from_pretrained(folder, **kwargs),
    "PolicyPipeline": lambda folder, policy, **kwargs: PolicyPipeline.from_pretrained(folder, **kwargs).policy,
}
MUTATIONS = {
    "dropped": lambda weights, name: weights.pop(name),
    "renamed": lambda weights, name: weights.update({name + "_old": weights.pop(name)}),
    "reshaped": lambda weights, name: weights.update({name: torch.zeros(*weights[name].shape, 2)}),
    "shortened": lambda weights, name: weights.update({name: weights[name].flatten()[1:].clone()}),
}


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


@pytest.fixture
def saved(complete_case, build, processor_of, tmp_path):
    """A policy and the folder that holds it."""
    policy = build(complete_case)
    policy.save_pretrained(tmp_path / "saved")
    processor_of(policy.config).save_pretrained(tmp_path / "saved")
    return policy, tmp_path / "saved"


def write(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check_refused(load, folder, weights, name, mutation):
    broken = dict(weights)
    MUTATIONS[mutation](broken, name)
    write(folder, broken)
    with pytest.raises(WeightsMismatchError) as caught:
        load(folder)
    assert name in str(caught.value), f"{mutation} {name}: {caught.value}"
    named = caught.value.missing + caught.value.unexpected + [row[0] for row in caught.value.mismatched]
    assert set(named) <= {name, name + "_old"}


def test_every_tensor_is_needed(saved):
    """Each is broken in one way, its neighbours in the others."""
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(policy.state_dict())
    for name, mutation in zip(weights, cycle(("dropped", "renamed", "reshaped")), strict=False):
        check_refused(type(policy).from_pretrained, folder, weights, name, mutation)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_door_is_strict(saved, door, mutation):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights)[::20]:
        check_refused(lambda source: door(source, policy), folder, weights, name, mutation)


def spoiled(weights, value, every=3):
    """Return weights of which some tensors hold one NaN, or one infinity, and the names of those."""
    names = sorted(name for name, tensor in weights.items() if tensor.is_floating_point())[::every]
    changed = {name: weights[name].clone() for name in names}
    for tensor in changed.values():
        tensor.view(-1)[-1] = value
    return weights | changed, names


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_no_number_is_found_at_every_door(saved, door, value):
    policy, folder = saved
    weights, names = spoiled(load_file(folder / "model.safetensors"), value)
    write(folder, weights)
    with pytest.raises(WeightsValueError, match="NaN or infinity") as caught:
        door(folder, policy)
    assert caught.value.not_finite == names


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_kind_are_not_cast(saved, door, kind):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    names = sorted(name for name, tensor in weights.items() if tensor.is_floating_point())[::5]
    write(folder, weights | {name: weights[name].to(kind) for name in names})
    with pytest.raises(WeightsValueError, match="not that of weights") as caught:
        door(folder, policy)
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


def test_extra_tensor(saved, door):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    # Names that transformers ignores in some of its own models are no exception.
    for name in ("stray.weight", "rotary_emb.inv_freq", "position_ids", "bn1.num_batches_tracked"):
        write(folder, weights | {name: torch.zeros(2)})
        with pytest.raises(WeightsMismatchError, match=name):
            door(folder, policy)


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


def test_allow_partial_fills_only_what_is_missing(saved, door):
    policy, folder = saved
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(weights)[0]
    write(folder, {name: value for name, value in weights.items() if name != dropped} | {"stray": torch.zeros(1)})
    loaded = door(folder, policy, allow_partial=True).state_dict()
    assert torch.isfinite(loaded[dropped]).all()
    for name in weights.keys() - {dropped}:
        assert torch.equal(loaded[name], weights[name]), name


@pytest.mark.parametrize("arguments", [{"use_safetensors": True}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_transformers_own_arguments_are_accepted(saved, door, arguments):
    policy, folder = saved
    loaded = door(folder, policy, **arguments)
    assert torch.equal(next(iter(loaded.parameters())), next(iter(policy.parameters())))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_file(saved, door, kept):
    policy, folder = saved
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with pytest.raises(CorruptFileError):
        door(folder, policy)


def test_no_weights(saved, door):
    policy, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        door(folder, policy)


def test_pickled_weights_are_never_read(saved, door):
    policy, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(policy.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin"):
        door(folder, policy)


def test_other_formats_cannot_be_asked_for(saved, door):
    policy, folder = saved
    torch.save(policy.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        door(folder, policy, use_safetensors=False)


def test_unknown_argument(saved, door):
    policy, folder = saved
    with pytest.raises(UnknownConfigFieldError, match=r"'n_obs_step'\. Did you mean 'n_obs_steps'"):
        door(folder, policy, n_obs_step=1)


# --- shards -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(saved, tmp_path):
    policy, folder = saved
    (folder / "model.safetensors").unlink()
    policy.save_pretrained(folder, max_shard_size=30_000)
    assert len(list(folder.glob("*-of-*"))) > 2
    return policy, folder


def test_missing_shard(sharded, door):
    policy, folder = sharded
    lost = sorted(folder.glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(MissingFileError, match=lost.name):
        door(folder, policy)


def test_truncated_shard(sharded, door):
    policy, folder = sharded
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptFileError):
        door(folder, policy)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_corrupt_index(sharded, door, text):
    policy, folder = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match="index"):
        door(folder, policy)


def test_missing_index(sharded, door):
    policy, folder = sharded
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingFileError, match="-of-"):
        door(folder, policy)


def test_tensor_missing_from_its_shard(sharded, door):
    policy, folder = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = sorted(index["weight_map"].items())[5]
    weights = load_file(folder / file)
    del weights[name]
    save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(WeightsMismatchError, match=name):
        door(folder, policy)


def test_config_without_the_weights_it_describes(saved, door, tmp_path):
    """An override of a width is a contradiction with the weights, not a way to half-load them."""
    policy, folder = saved
    shutil.copytree(folder, tmp_path / "wider")
    config = json.loads((tmp_path / "wider" / "config.json").read_text())
    config["output_features"]["action"]["shape"] = [9]
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    # A policy that pads its actions says that they no longer fit.
    with pytest.raises((WeightsMismatchError, InvalidConfigError), match=r"expected|cannot be widened"):
        door(tmp_path / "wider", policy)
