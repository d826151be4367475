"""Weights that are not where a policy computes: offloaded, sharded, behind a device map; kernels that are refused."""

import socket

import pytest
import torch
import torch.distributed as dist
from accelerate import disk_offload
from transformers import pipeline

from manipulators import AutoPolicy
from manipulators.errors import InvalidConfigError
from manipulators.inference.speed import example_request


def predict(policy):
    return policy.predict_action_chunk(**policy.config.example_inputs(2), **policy.config.example_draws(2))


def test_weights_on_the_disk(complete_case, checkpoint, tmp_path):
    policy, folder = checkpoint(complete_case)
    expected = predict(policy)
    children = [name for name, _ in policy.named_children()]
    if len(children) == 1:  # the whole policy on the disk is a matter of `disk_offload`
        children = [f"{children[0]}.{name}" for name, _ in policy.get_submodule(children[0]).named_children()]
    for first in (0, 1):
        where = {name: ("cpu", "disk")[(i + first) % 2] for i, name in enumerate(children)}
        loaded = AutoPolicy.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offload")
        assert torch.equal(predict(loaded), expected)
    policy = AutoPolicy.from_pretrained(folder)
    assert torch.equal(predict(disk_offload(policy, tmp_path / "other", execution_device="cpu")), expected)
    draws = policy.config.example_draws(2, training=True)
    with torch.no_grad():
        assert torch.isfinite(policy.train()(**policy.config.example_inputs(2), **draws).loss)


def test_a_device_map_through_transformers_pipeline(complete_case, checkpoint):
    folder = checkpoint(complete_case)[1]
    robot = pipeline("robotics", str(folder), device_map="auto")
    observation, task = example_request(robot, 1)
    assert robot.predict_chunk(observation, task).shape[-1] == 2


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("units", ["layers", "components"])
def test_fully_sharded(complete_case, build, one_process, units):
    from torch.distributed.fsdp import fully_shard

    policy, sharded = build(complete_case), build(complete_case)
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2, training=True)
    policy(**inputs, **draws).loss.backward()
    inner = sharded.children() if units == "components" else sharded.modules()
    for module in list(inner):
        if units == "components" or type(module).__name__ in sharded._no_split_modules:
            fully_shard(module, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    assert torch.equal(predict(sharded), predict(policy))
    sharded(**inputs, **draws).loss.backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(sharded.get_parameter(name).grad.full_tensor(), parameter.grad, msg=name)
    held = sharded.state_dict()
    assert all(torch.equal(held[name].full_tensor(), p) for name, p in policy.named_parameters())


@pytest.mark.parametrize("name", ["pi0", "gr00t_n1_5", "gr00t_n1"])
def test_flex_attention_is_refused_on_a_cpu(request, name):
    config = request.getfixturevalue(f"tiny_{name}")()
    config.attention_implementation = "flex_attention"
    policy = AutoPolicy.from_config(config).eval()
    with pytest.raises(InvalidConfigError, match="runs on a GPU only"):
        policy.predict_action_chunk(**config.example_inputs(1))
