"""The stages that a policy names: compiled, and observed."""

import copy

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils._pytree import tree_leaves

from manipulators import AutoPolicy
from manipulators.errors import InferenceOnlyError
from manipulators.modeling.stages import CompiledStage, example_observation, observed_stages, stages_of


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def all_inputs(policy, batch_size=1):
    return example_observation(policy, batch_size) | policy.config.example_draws(batch_size)


def chunk(policy, batch_size=1):
    return policy.predict_action_chunk(**all_inputs(policy, batch_size))


def test_compiled_policy_predicts_the_same(complete_case, build):
    """Every stage is one graph (`fullgraph=True`); what warm-up compiled serves the calls after it, of its shapes."""
    policy, backend = build(complete_case), EagerAndRecordGraphs()
    one, three = chunk(policy), chunk(policy, 3)
    assert policy.compile(inputs=all_inputs(policy), backend=backend) is policy
    compiled = len(backend.graphs)
    assert compiled >= len(stages_of(policy)) >= 1
    assert all(type(getattr(*stage)) is CompiledStage for stage in stages_of(policy).values())
    torch.testing.assert_close(chunk(policy), one, atol=1e-6, rtol=1e-5)
    assert len(backend.graphs) == compiled
    torch.testing.assert_close(chunk(policy, 3), three, atol=1e-6, rtol=1e-5)
    assert len(backend.graphs) == 2 * compiled
    # A tensor of Python numbers is made on the host and copied to the device, which CUDA graphs cannot hold.
    assert not [node for graph in backend.graphs for node in graph.graph.nodes if node.target is torch.tensor]


def test_traced_through_aot(complete_case, build):
    """As inductor sees it, without views and without writing into inputs; fused where there is something to fuse."""
    policy = build(complete_case)
    expected = chunk(policy)
    torch.testing.assert_close(chunk(policy.fuse().compile(backend="aot_eager")), expected, atol=1e-5, rtol=1e-5)


def test_compiled_policies_are_saved_and_copied(complete_case, build, tmp_path):
    policy = build(complete_case).compile(batch_size=2, backend="eager")
    expected = chunk(policy)
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    torch.testing.assert_close(chunk(loaded), expected, atol=1e-6, rtol=1e-5)
    copied = copy.deepcopy(policy)
    assert not any(isinstance(getattr(*stage), CompiledStage) for stage in stages_of(copied).values())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(chunk(copied), expected, atol=1e-4)  # by its own weights
    torch.testing.assert_close(chunk(policy), expected, atol=1e-6, rtol=1e-5)


def test_every_stage_is_compiled_with_the_options(complete_case, build):
    policy, filtered = build(complete_case), []

    def keep_all(guards):
        filtered.append(len(guards))
        return [True for _ in guards]

    options = {"guard_filter_fn": keep_all}
    policy.compile(inputs=all_inputs(policy), backend="eager", options=options)
    assert len(filtered) >= len(stages_of(policy)) and options == {"guard_filter_fn": keep_all}


def test_compiled_for_cuda_graphs(complete_case, build, monkeypatch):
    """They are told once per chunk that one begins, and no stage's result is handed out: the next overwrites it."""
    policy, begun, results = build(complete_case), [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))

    def around(stage, call):
        def observed(*args, **kwargs):
            results.append(call(*args, **kwargs))
            return results[-1]

        return observed

    policy.compile(backend="eager").compile(backend="eager")
    begun.clear()
    with observed_stages(policy, around):
        actions = chunk(policy)
    assert len(begun) == 1
    storages = {x.untyped_storage().data_ptr() for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
    assert storages and actions.untyped_storage().data_ptr() not in storages


def test_compiling_is_for_inference(complete_case, build):
    with pytest.raises(InferenceOnlyError, match=r"training mode.*policy\.eval\(\)\.compile\(\)"):
        build(complete_case).train().compile()


def test_observed_for_a_while(policy):
    """In the order they are named; every one is called, and afterwards nothing is left."""
    calls = []

    def around(stage, call):
        def observed(*args, **kwargs):
            calls.append(stage)
            return call(*args, **kwargs)

        return observed

    expected = chunk(policy)
    with observed_stages(policy, around):
        assert torch.equal(chunk(policy), expected)
    seen = list(dict.fromkeys(calls))
    assert seen == list(stages_of(policy))
    calls.clear()
    assert torch.equal(chunk(policy), expected) and not calls
