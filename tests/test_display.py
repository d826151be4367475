"""What a pipeline, a measured speed and an evaluation show of themselves, in a terminal and in a notebook."""

import numpy as np
import pytest

from manipulators import ACTPolicy, EvaluationResult, PolicyPipeline, PolicyProcessor
from manipulators.inference.speed import Speed


@pytest.fixture
def pipeline(tiny_act, statistics_of):
    config = tiny_act({"wrist": (3, 32, 32)}, n_action_steps=2)
    processor = PolicyProcessor.from_config(
        config, statistics_of(config), dimension_names={"action": ["x<y", "grip"]}, units={"action": ["m", "1"]}
    )
    return PolicyPipeline(model=ACTPolicy(config), processor=processor, device="cpu", max_action_step={"grip": 0.5})


def test_a_pipeline(pipeline):
    pipeline({"observation.state": np.full(3, 0.5), "observation.images.wrist": np.zeros((32, 32, 3), np.uint8)})
    lines = [" ".join(line.split()) for line in repr(pipeline).splitlines()]
    assert lines[0] == "PolicyPipeline"
    assert "observation observation.images.wrist (3, 32, 32), observation.state (3,)" in lines
    assert "action (2,): x<y [m], grip [1]" in lines
    assert "chunk 5 actions, 2 executed" in lines
    assert "bounds max_action_step={'grip': 0.5}, observation_limit=100.0" in lines
    assert "\n" + " " * 16 + "- observation.images.wrist shows one colour only" in repr(pipeline)
    html = pipeline._repr_html_()
    assert (
        "x&lt;y [m]" in html
        and "1 observation:<br>- obs" in html
        and html.startswith("<table><caption>PolicyPipeline</caption><tr><th")
    )


def test_a_speed():
    speed = Speed("act_policy", "cpu, 1 threads", "float32", 1, 4, [0.02, 0.04], {"encode": [[0.01, 0.01], [0.02]]})
    assert repr(speed).splitlines() == [
        "Speed of act_policy, cpu, 1 threads, float32, batch 1",
        "  encode  20 ms, p95 20 ms",
        "  chunk   30 ms, p95 39 ms",
        "  rate    33.3 Hz, 133 actions per second",
    ]
    assert "<td style='text-align: left'>30 ms, p95 39 ms</td>" in speed._repr_html_()


def test_an_evaluation():
    result = EvaluationResult(
        environment="metaworld/reach-v3",
        task="Reach.",
        episodes=4,
        successes=3,
        success_rate=0.75,
        interval=[0.3, 0.95],
        mean_return=1.5,
        mean_length=20.25,
        milliseconds_per_action=2.0,
        num_envs=2,
        seeds=[7, 8, 9, 10],
        per_episode=[{}] * 4,
        clipped_fraction=0.5,
        horizon=100,
        versions={},
        n_action_steps=2,
    )
    lines = [" ".join(line.split()) for line in repr(result).splitlines()]
    assert lines[:4] == [
        "Evaluation in metaworld/reach-v3",
        "task Reach.",
        "solved 3 of 4, 75.0% (95 % interval 30.0% to 95.0%)",
        "length 20.2 of 100 steps on average",
    ]
    assert "seeds 7 to 10" in lines and "checkpoint" not in repr(result)
    assert "<caption>Evaluation in metaworld/reach-v3</caption>" in result._repr_html_()
