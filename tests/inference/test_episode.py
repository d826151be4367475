"""One pipeline drives one robot, in one thread; what is refused, or reset meanwhile, leaves nothing behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from manipulators import DiffusionPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import FeatureShapeError, FeatureValueError, ManipulatorsError, SharedPipelineError
from manipulators.processing.observation import Observation


def state(value):
    return {"observation.state": [value]}


def in_thread(call, *arguments):
    """Return what another thread returns, or the error that it raises."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="robot-2") as pool:
        return pool.submit(call, *arguments).result()


# --- one robot --------------------------------------------------------------------------------------------


def test_another_thread_is_refused_and_the_first_goes_on(last_two):
    pipeline = PolicyPipeline(**last_two(n_action_steps=2))
    assert pipeline(state(1.0)).tolist() == [1, 1]
    with pytest.raises(
        SharedPipelineError, match=r"'MainThread' began this episode, and 'robot-2_0' asks.*processor="
    ):
        in_thread(pipeline, state(7.0))
    assert in_thread(pipeline.predict_chunk, state(7.0))[0].tolist() == [7, 7]  # it has no part in the episode
    assert [pipeline(state(value)).tolist() for value in (2.0, 3.0)] == [[1, 101], [2, 3]]
    pipeline.reset()
    assert in_thread(pipeline, state(9.0)).tolist() == [9, 9]
    assert pipeline(state(10.0)).tolist() == [9, 109]  # that thread has ended: its robot is handed over


def test_of_two_threads_that_begin_at_once_one_is_refused(last_two):
    pipeline = PolicyPipeline(**last_two(n_action_steps=2))
    both, results = threading.Barrier(2), []

    def step(value):
        both.wait()
        try:
            results.append(pipeline(state(value)).tolist())
        except SharedPipelineError:
            results.append("refused")
        both.wait()

    threads = [threading.Thread(target=step, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("refused") == 1


def test_a_refused_first_observation_claims_no_robot(last_two):
    pipeline = PolicyPipeline(**last_two())
    both = threading.Barrier(2)

    def refused():
        with pytest.raises(FeatureValueError):
            pipeline(state(float("nan")))
        both.wait()
        both.wait()

    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(refused)
        both.wait()
        assert pipeline(state(4.0)).tolist() == [4, 4]
        both.wait()
        done.result()


def test_a_reset_while_a_chunk_is_predicted_begins_with_an_empty_queue(last_two):
    parts = last_two(n_action_steps=3)
    pipeline = PolicyPipeline(**parts)
    predict = parts["model"].predict_action_chunk

    def reset_meanwhile(**inputs):
        parts["model"].predict_action_chunk = predict
        pipeline.reset()
        return predict(**inputs)

    parts["model"].predict_action_chunk = reset_meanwhile
    assert pipeline(state(1.0)).tolist() == [1, 1]
    assert pipeline(state(5.0)).tolist() == [5, 5]


# --- every step is looked at ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [state(float("nan")), state("1"), {}, {"observation.state": [1.0, 2.0]}, state(1.0) | {"observation.x": 1}]
)
def test_observation_is_refused_while_actions_are_queued(last_two, bad):
    pipeline = PolicyPipeline(**last_two(n_action_steps=3))
    for value, expected in ((1.0, [1, 1]), (2.0, [1, 101]), (3.0, [1, 201]), (4.0, [3, 4])):
        with pytest.raises(ManipulatorsError):
            pipeline(bad)
        assert pipeline(state(value)).tolist() == expected


@pytest.mark.parametrize("sampling", [{"num_steps": 0}, {"generator": 3}, {"nose": torch.zeros(1)}, {"state": 1}])
def test_arguments_are_refused_while_actions_are_queued(last_two, sampling):
    pipeline = PolicyPipeline(**last_two(n_action_steps=3))
    pipeline(state(1.0))
    with pytest.raises(ManipulatorsError):
        pipeline(state(2.0), **sampling)
    assert pipeline(state(2.0)).tolist() == [1, 101]


def test_another_batch_is_refused_while_actions_are_queued_and_leaves_no_trace(last_two):
    pipeline = PolicyPipeline(**last_two(n_action_steps=2))
    pipeline(state(1.0))
    with pytest.raises(FeatureShapeError, match="call reset"):
        pipeline({"observation.state": [[7.0], [8.0]]})
    assert pipeline.observation_report.observations == 1
    assert [pipeline(state(value)).tolist() for value in (2.0, 3.0)] == [[1, 101], [2, 3]]


def test_history_holds_what_a_prediction_looks_at_and_copies_no_more(last_two, monkeypatch):
    """The network sees the last two observations; of five queued steps only the last is kept for it."""
    pipeline = PolicyPipeline(**last_two(n_action_steps=3))
    copied = []
    copy = Observation.copied
    monkeypatch.setattr(Observation, "copied", lambda self: copied.append(float(self.state)) or copy(self))
    actions = [pipeline(state(float(value))).tolist() for value in range(1, 8)]
    assert actions == [[1, 1], [1, 101], [1, 201], [3, 4], [3, 104], [3, 204], [6, 7]]
    assert copied == [1, 3, 4, 6, 7]


def test_a_refused_prediction_takes_its_random_numbers_back(act):
    parts = act()
    pipeline = PolicyPipeline(**parts)
    seen = []

    def draws(generator=None, **_):
        seen.append(torch.randn(1, 5, 2, generator=generator))
        return seen[-1] * (float("nan") if len(seen) % 2 else 1.0)

    parts["model"].predict_action_chunk = draws
    observation = {"observation.state": np.zeros(3)} | {
        f"observation.images.{name}": np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        for name in ("wrist", "above")
    }
    for sampling in ({}, {"generator": torch.Generator().manual_seed(0)}):
        with pytest.raises(FeatureValueError, match="The predicted chunk holds NaN"):
            pipeline.predict_chunk(observation, **sampling)
        pipeline.predict_chunk(observation, **sampling)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])


# --- cameras that come and go -----------------------------------------------------------------------------


@pytest.fixture
def cameras_with_history(tiny_diffusion, statistics_of):
    """Return a Diffusion Policy that looks at two observations of a camera, and of one that may be absent."""
    config = tiny_diffusion(
        {"wrist": (3, 32, 32), "above": (3, 32, 32)},
        optional_cameras=("observation.images.above",),
        n_action_steps=1,
    )
    torch.manual_seed(0)
    processor = PolicyProcessor.from_config(config, statistics_of(config))
    return PolicyPipeline(model=DiffusionPolicy(config), processor=processor, device="cpu")


def test_an_optional_camera_that_comes_back_begins_its_history(cameras_with_history, monkeypatch):
    pipeline, seen = cameras_with_history, []
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    predict = pipeline.policy.predict_action_chunk
    monkeypatch.setattr(
        pipeline.policy, "predict_action_chunk", lambda **inputs: seen.append(inputs) or predict(**inputs)
    )
    for step, is_there in enumerate((True, False, True, True)):
        observation = {"observation.state": np.zeros(3), "observation.images.wrist": pictures[step]}
        pipeline(observation | ({"observation.images.above": pictures[step]} if is_there else {}))
    assert [inputs["pixel_mask"][0].tolist() for inputs in seen] == [
        [True, True],
        [True, False],
        [True, True],
        [True, True],
    ]
    expected = pipeline.processor(
        {"observation.state": np.zeros((1, 2, 3))}
        | {
            name: pictures[None, [first, last]]
            for name, first, last in (("observation.images.wrist", 1, 2), ("observation.images.above", 2, 2))
        }
    )
    assert torch.equal(seen[2]["pixel_values"], expected["pixel_values"])


def test_pictures_that_change_their_type_under_history_keep_their_scale(cameras_with_history, monkeypatch):
    pipeline, seen = cameras_with_history, []
    predict = pipeline.policy.predict_action_chunk
    monkeypatch.setattr(
        pipeline.policy, "predict_action_chunk", lambda **inputs: seen.append(inputs) or predict(**inputs)
    )
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for given in (picture, picture / 255, picture):
        pipeline({"observation.state": np.zeros(3), "observation.images.wrist": given})
    for inputs in seen:
        torch.testing.assert_close(inputs["pixel_values"], seen[0]["pixel_values"])


def test_a_batch_dimension_in_some_features_only(cameras_with_history):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    with pytest.raises(FeatureValueError, match=r"only observation\.state has a batch dimension"):
        cameras_with_history({"observation.state": np.zeros((1, 3)), "observation.images.wrist": picture})
    with pytest.raises(FeatureShapeError, match="one batch size, at least 1"):
        cameras_with_history({"observation.state": np.zeros((0, 3)), "observation.images.wrist": picture[None][:0]})
