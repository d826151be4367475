"""Observations against the training data: states out of range, dead, frozen and swapped cameras, and what is said."""

import logging

import numpy as np
import pytest
import torch

from manipulators import ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import ImplausibleObservationError, InvalidConfigError
from manipulators.inference.observation_report import Outside
from manipulators.processing.imagenet import IMAGENET_STATISTICS

STATE, CAMERA = "observation.state", "observation.images.above"
# A joint [rad], a height [m], and a joint that hardly moved.
RANGES = {"min": [-1.0, 0.2, 0.0], "max": [1.0, 0.6, 0.001]}
COLOURS = {"mean": [0.6, 0.5, 0.3], "std": [0.1, 0.1, 0.1]}


@pytest.fixture
def build(tiny_act, statistics_of):
    """Return a function: statistics of state and camera, and arguments → a pipeline with a camera and three states."""

    def pipeline(state=RANGES, camera=COLOURS, **arguments):
        config = tiny_act({"above": (3, 32, 32)}, normalization_mapping={"STATE": "IDENTITY", "VISUAL": "IDENTITY"})
        statistics = statistics_of(config) | {STATE: state, CAMERA: camera}
        torch.manual_seed(0)
        processor = PolicyProcessor.from_config(
            config,
            statistics,
            dimension_names={STATE: ["joint", "height", "wrist"]},
            units={STATE: ["rad", "m", "rad"]},
        )
        return PolicyPipeline(model=ACTPolicy(config), processor=processor, device="cpu", **arguments)

    return pipeline


def picture(seed=0, mean=(0.6, 0.5, 0.3), size=32):
    levels = np.random.default_rng(seed).normal(mean, 0.1, (size, size, 3))
    return (levels.clip(0, 1) * 255).astype(np.uint8)


def observation(state=(0.0, 0.4, 0.0), seed=0, **changes):
    return {STATE: np.array(state), CAMERA: picture(seed)} | changes


# --- states -----------------------------------------------------------------------------------------------


def test_what_is_inside_is_not_named(build):
    pipeline = build()
    for seed in range(3):
        pipeline(observation(seed=seed))
    report = pipeline.observation_report
    assert (report.observations, report.dimensions, report.cameras) == (3, {}, {})
    assert str(report) == "3 observations, nothing unusual"


def test_dimensions_outside_are_named_in_robot_units(build, caplog):
    pipeline = build()
    with caplog.at_level(logging.WARNING):
        for seed, state in enumerate(((0.0, 0.4, 0.0), (0.0, 1.2, 0.0), (-1.5, 0.7, 0.0))):
            pipeline(observation(state, seed))
            pipeline.predict_chunk(observation((0.0, 0.4, 0.0), seed + 3))
    found = pipeline.observation_report.dimensions[STATE]
    assert found["height"] == Outside(pytest.approx(2 / 6), pytest.approx(0.6), pytest.approx(1.5), 0.2, 0.6, "m")
    assert found["joint"] == Outside(pytest.approx(1 / 6), pytest.approx(-0.5), pytest.approx(0.25), -1.0, 1.0, "rad")
    assert found.keys() == {"joint", "height"}
    assert pipeline.observation_report.findings[0] == (
        "observation.state 'height' was up to 0.6 m above its training range of 0.2 to 0.6 m, in 33% of the "
        "observations"
    )
    pipeline.reset()
    assert pipeline.observation_report.observations == 0
    pipeline(observation((0.0, 1.2, 0.0)))
    assert len(caplog.records) == 1  # once, for all episodes
    assert "'height' was up to 0.6 m above" in caplog.text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            (0.0, 400.0, 0.0),
            r"'height' is 400; in training it was 0\.2 to 0\.6 m, so that it lies 998\.5 training ranges",
        ),
        ((-1e4, 0.4, 0.0), r"'joint' is -10000; in training it was -1 to 1 rad"),
        ((0.0, 0.4, 3e38), r"'wrist' is 3e\+38"),
    ],
)
def test_absurd_states_are_refused_also_while_actions_are_queued(build, state, words):
    pipeline, undisturbed = build(), build()
    for seed in range(3):
        with pytest.raises(ImplausibleObservationError, match=words + ".*observation_limit=None"):
            pipeline(observation(state))
        with pytest.raises(ImplausibleObservationError):
            pipeline.predict_chunk(observation(state))
        assert torch.equal(pipeline(observation(seed=seed)), undisturbed(observation(seed=seed)))
    assert pipeline.observation_report == undisturbed.observation_report


def test_a_dimension_that_hardly_moved_is_measured_by_the_widest(build):
    """A locked joint that stands elsewhere is no fault of units: 100 of its own ranges are 0.1 rad."""
    pipeline = build()
    pipeline(observation((0.0, 0.4, 0.5)))
    assert pipeline.observation_report.dimensions[STATE]["wrist"].ranges == pytest.approx(0.499 / 0.2)
    with pytest.raises(ImplausibleObservationError, match="'wrist' is 21"):
        pipeline(observation((0.0, 0.4, 21.0)))


@pytest.mark.parametrize(
    "statistics",
    [
        {"q01": [-1.0] * 3, "q99": [1.0] * 3},
        {"mean": [0.0] * 3, "std": [1 / 3] * 3},
        {"q10": [-1.0] * 3, "q90": [1.0] * 3},
    ],
)
def test_other_statistics_stand_in_for_the_range(build, statistics):
    with pytest.raises(ImplausibleObservationError, match="in training it was -1 to 1 rad"):
        build(statistics)(observation((300.0, 0.0, 0.0)))


def test_without_statistics_nothing_is_compared(build):
    pipeline = build(state={}, camera={})
    pipeline(observation((1e4, 0.0, 0.0), **{CAMERA: picture()[..., ::-1]}))
    assert pipeline.observation_report.findings == []


def test_the_limit_is_an_argument(build):
    far = observation((0.0, 4.4, 0.0))  # 9.5 ranges
    build()(far)
    with pytest.raises(ImplausibleObservationError, match="Up to 5 are allowed"):
        build(observation_limit=5)(far)
    pipeline = build(observation_limit=None)
    pipeline(observation((1e6, 0.4, 0.0)))
    assert pipeline.observation_report.dimensions[STATE]["joint"].ranges == pytest.approx(499999.5)
    for limit in (0, -1, "100", float("nan")):
        with pytest.raises(InvalidConfigError, match=r"observation_limit=.* must be above 0"):
            build(observation_limit=limit)


def test_the_farthest_of_a_batch_is_named(build):
    pipeline = build()
    rows = [observation((0.0, height, 0.0)) for height in (0.4, 1.4, -0.4)]
    pipeline({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    outside = pipeline.observation_report.dimensions[STATE]["height"]
    assert (outside.share, outside.farthest) == (pytest.approx(2 / 3), pytest.approx(0.8))


# --- cameras ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "findings"),
    [
        (np.zeros((32, 32, 3), np.uint8), {"flat", "brightness"}),
        (picture() / 255 / 255, {"flat", "brightness"}),
        ((picture() > 127).astype(np.uint8), {"flat", "brightness"}),
        (255 - picture(mean=(0.6, 0.6, 0.3)), {"brightness", "channels"}),
        (picture()[..., ::-1], {"brightness", "channels"}),
        (picture(mean=(0.5, 0.45, 0.4)), set()),
        (torch.from_numpy(picture()).bfloat16() / 255, set()),
    ],
)
def test_what_is_wrong_with_a_camera_is_named(build, caplog, given, findings):
    pipeline = build()
    with caplog.at_level(logging.WARNING):
        pipeline(observation(**{CAMERA: given}))  # one predicts,
        pipeline(observation(**{CAMERA: given}))  # the other only takes a queued action
    assert pipeline.observation_report.cameras.get(CAMERA, {}) == dict.fromkeys(findings, 1.0)
    assert len(caplog.records) == len(findings)


def test_colours_of_a_pretrained_backbone_say_nothing_of_a_camera(build):
    pipeline = build(camera=IMAGENET_STATISTICS)
    pipeline(observation(**{CAMERA: picture(mean=(0.1, 0.4, 0.9))}))
    assert pipeline.observation_report.cameras == {}


def test_a_single_bright_object_is_no_dead_camera(build):
    pipeline = build(camera={})
    still = np.zeros((32, 32, 3), np.uint8)
    still[7, 9] = 200  # between the pixels that are looked at first
    pipeline(observation(**{CAMERA: still}))
    assert pipeline.observation_report.cameras == {}


def test_a_frozen_camera_is_named_once_the_robot_moves(build, caplog):
    pipeline = build()
    for joint in (0.0, 0.0, 0.0, 0.05, 0.08):  # at rest, then 4 % of its range
        pipeline(observation((joint, 0.4, 0.0)))
    assert pipeline.observation_report.cameras == {}
    with caplog.at_level(logging.WARNING):
        pipeline(observation((0.5, 0.4, 0.0)))
        pipeline(observation((0.6, 0.4, 0.0)))
    assert pipeline.observation_report.cameras == {CAMERA: {"frozen": pytest.approx(2 / 7)}}
    assert [record.message.split(".")[1] for record in caplog.records] == ["images"]
    pipeline.reset()
    pipeline(observation((-0.6, 0.4, 0.0)))
    assert pipeline.observation_report.cameras == {}


def test_a_picture_that_changes_anywhere_is_not_frozen(build):
    pipeline = build()
    for step in range(6):
        still = picture()
        still[7, 9] = 40 * step
        pipeline(observation((0.2 * step, 0.4, 0.0), **{CAMERA: still}))
    assert pipeline.observation_report.cameras == {}


def test_only_the_frozen_one_of_a_batch_is_counted(build):
    pipeline = build()
    for step in range(4):
        joint = np.array([[0.2 * step, 0.4, 0.0]] * 2)
        pipeline({STATE: joint, CAMERA: np.stack([picture(0), picture(step)])})
    assert pipeline.observation_report.cameras == {CAMERA: {"frozen": pytest.approx(2 / 8)}}
