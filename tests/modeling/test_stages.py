"""The stages that a policy names: compiled, and observed."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_leaves

from manipulators import AutoPolicy
from manipulators.errors import InferenceOnlyError
from manipulators.modeling.policy import PolicyModel
from manipulators.modeling.stages import CompiledStage, example_observation, observed_stages, stages_of

CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))["CASES"]
COMPLETE = [name for name, case in CASES.items() if case.complete]


def all_inputs(policy, batch_size=1):
    return example_observation(policy, batch_size) | policy.config.example_draws(batch_size)


def chunk(policy, batch_size=1):
    return policy.predict_action_chunk(**all_inputs(policy, batch_size))


def recorder(graphs):
    """Return a backend: as inductor sees them, without views and without writing into inputs; it keeps the graphs."""

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend


@pytest.fixture(scope="module", params=COMPLETE)
def compiled(request, build):
    """A compiled policy, what it predicted before, and what the compiler was given; no test changes the policy."""
    torch._dynamo.reset()
    policy, graphs, guards = build(CASES[request.param]), [], []
    expected = chunk(policy)

    def keep_all(entries):
        guards.append(len(entries))
        return [True for _ in entries]

    options = {"backend": recorder(graphs), "options": {"guard_filter_fn": keep_all}}
    assert policy.compile(inputs=all_inputs(policy), **options) is policy
    assert options["options"] == {"guard_filter_fn": keep_all}
    return SimpleNamespace(policy=policy, expected=expected, graphs=graphs, guards=guards, options=options)


def test_compiled_policy_predicts_the_same(compiled):
    """Every stage is one graph (`fullgraph=True`); what warm-up compiled serves the calls after it."""
    policy, graphs, warmed_up = compiled.policy, compiled.graphs, len(compiled.graphs)
    assert warmed_up >= len(stages_of(policy)) >= 1
    assert all(type(getattr(*stage)) is CompiledStage for stage in stages_of(policy).values())
    torch.testing.assert_close(chunk(policy), compiled.expected, atol=1e-6, rtol=1e-5)
    assert len(graphs) == warmed_up
    # A tensor of Python numbers is made on the host and copied to the device, which CUDA graphs cannot hold.
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target is torch.tensor]


def test_every_stage_is_compiled_with_the_options(compiled):
    assert len(compiled.guards) == len(compiled.graphs) >= len(stages_of(compiled.policy))


def test_compiled_policies_are_saved_and_copied(compiled, tmp_path):
    policy = compiled.policy
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


def test_compiled_for_cuda_graphs(compiled, monkeypatch):
    """They are told once per chunk that one begins, and no stage's result is handed out: the next overwrites it."""
    policy, begun, results = compiled.policy, [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))

    def around(stage, call):
        def observed(*args, **kwargs):
            results.append(call(*args, **kwargs))
            return results[-1]

        return observed

    known = len(compiled.graphs)
    policy.compile(**compiled.options)  # once more, and with the config's own inputs
    assert len(compiled.graphs) == known
    begun.clear()
    with observed_stages(policy, around):
        actions = chunk(policy)
    assert len(begun) == 1
    storages = {x.untyped_storage().data_ptr() for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
    assert storages and actions.untyped_storage().data_ptr() not in storages


def test_other_shapes_are_compiled_when_they_come(build):
    """What warm-up compiled serves its own; test_policies.py compares compiled batches of every policy."""
    policy, graphs = build(CASES[COMPLETE[0]]), []
    one, three = chunk(policy), chunk(policy, 3)
    policy.compile(batch_size=3, backend=recorder(graphs))
    warmed_up = len(graphs)
    torch.testing.assert_close(chunk(policy, 3), three, atol=1e-6, rtol=1e-5)
    assert len(graphs) == warmed_up
    torch.testing.assert_close(chunk(policy), one, atol=1e-6, rtol=1e-5)
    assert len(graphs) == 2 * warmed_up


def test_fused_policy_is_traced_through_aot(complete_case, build):
    """Where there is something to fuse: the others are compiled above as they are."""
    policy = build(complete_case)
    if type(policy)._fuse is not PolicyModel._fuse:
        expected = chunk(policy)
        torch.testing.assert_close(chunk(policy.fuse().compile(backend="aot_eager")), expected, atol=1e-5, rtol=1e-5)


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
