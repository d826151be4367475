"""Observations are read and renamed once, with a batch dimension or without, with history or without."""

import numpy as np
import pytest
import torch

from manipulators import ACTConfig, ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import FeatureShapeError, MissingFeatureError
from manipulators.processing import observation as module
from manipulators.processing.observation import Observation


def raw(*leading):
    return {
        "observation.images.top": np.full((*leading, 4, 6, 3), 51, dtype=np.uint8),
        "observation.state": np.broadcast_to(np.array([1.0, 2.0]), (*leading, 2)),
        "task": "press it",
    }


def test_what_was_read_is_not_read_again(history_processor):
    read = history_processor.read_observation(raw())
    assert isinstance(read, Observation)
    assert (read.batched, read.batch_size, read.leading, read.task) == (False, 1, (1, 2), "press it")
    assert history_processor.read_observation(read) is read
    assert read.state.tolist() == [[1.0, 2.0]]
    for name, value in history_processor(raw()).items():
        assert torch.equal(history_processor(read)[name], value), name


def test_history_is_stacked(history_processor):
    past = history_processor.read_observation(raw(3), steps=1)
    now = Observation(past | {"observation.state": past["observation.state"] + 1})
    stacked = Observation.stacked([past, now])
    assert (stacked.steps, stacked.leading) == (2, (3, 2))
    assert stacked["observation.state"][0].tolist() == [[1.0, 2.0], [2.0, 3.0]]
    assert history_processor.read_observation(stacked) is stacked
    with pytest.raises(FeatureShapeError, match="then 2 observations of history"):
        history_processor.read_observation(past)


@pytest.mark.parametrize(("leading", "expected"), [((), ()), ((1,), (1,)), ((5,), (5,))])
def test_batch_is_as_the_arrays_come(history_processor, leading, expected):
    history_processor.rename_map = {"hand": "observation.images.top"}
    observation = raw(*leading)
    observation["hand"] = observation.pop("observation.images.top")
    assert history_processor.read_observation(observation, 1).batch == expected


@pytest.mark.parametrize("relative_to", [None, [0, None]])
def test_pipeline_reads_every_array_once_per_step(monkeypatch, relative_to):
    config = ACTConfig(
        input_features={"observation.state": {"type": "STATE", "shape": [2]}},
        output_features={"action": {"type": "ACTION", "shape": [2]}},
        normalization_mapping=dict.fromkeys(("STATE", "ACTION"), "IDENTITY"),
        chunk_size=2,
        dim_model=8,
        n_heads=1,
        dim_feedforward=8,
        use_vae=False,
    )
    processor = PolicyProcessor.from_config(config, relative_to=relative_to, rename_map={"arm": "observation.state"})
    pipeline = PolicyPipeline(model=ACTPolicy(config), processor=processor, device="cpu")
    read, names = module.read_vector, []
    monkeypatch.setattr(module, "read_vector", lambda name, *rest: names.append(name) or read(name, *rest))
    pipeline({"arm": [1.0, 2.0]})
    assert names == ["observation.state"]
    pipeline({"arm": [1.0, 2.0]})  # from the queue
    assert names == ["observation.state"] * 2


def test_a_camera_that_only_some_observations_have(history_processor):
    """A list with None where there is no picture; with history, one that comes begins with its first picture."""
    history_processor.optional_cameras = ["observation.images.top"]
    picture = np.full((4, 6, 3), 51, dtype=np.uint8)
    states = np.ones((3, 2))

    def read(*pictures):
        return history_processor.read_observation(
            {"observation.images.top": list(pictures), "observation.state": states}, steps=1
        )

    past, now, without = read(None, picture, picture), read(picture, picture * 2, None), read(None, None, None)
    assert "observation.images.top" not in without
    assert past.present["observation.images.top"].tolist() == [False, True, True] and past.leading == (3,)
    inputs = history_processor(Observation.stacked([past, now]))
    assert inputs["pixel_mask"].tolist() == [[True], [True], [False]]
    pictures = inputs["pixel_values"]  # (b, t, v, c, h, w)
    assert torch.equal(pictures[0, 0], pictures[0, 1]) and pictures[0].any() and not pictures[2].any()
    assert torch.equal(pictures[1, 0], pictures[0, 0]) and not torch.equal(pictures[1, 1], pictures[1, 0])
    whole = history_processor(Observation.stacked([now.copied(), now.copied()]))
    assert whole["pixel_mask"].tolist() == [[True], [True], [False]]
    came = history_processor(Observation.stacked([without, now]))
    assert came["pixel_mask"].tolist() == [[True], [True], [False]]
    assert torch.equal(came["pixel_values"][:, 0], came["pixel_values"][:, 1])


def test_a_camera_that_is_not_optional_may_not_be_none(history_processor):
    with pytest.raises(MissingFeatureError, match=r"Observation 1 of 2 lacks observation\.images\.top"):
        history_processor(raw(2) | {"observation.images.top": [np.zeros((2, 4, 6, 3), np.uint8), None]})
