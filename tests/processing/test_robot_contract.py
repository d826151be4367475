"""What the robot and the policy agree on: embodiments, optional cameras, ranges, the printed contract."""

import numpy as np
import pytest
import torch

from manipulators import ACTConfig, ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import EmbodimentError, InvalidConfigError, MissingFeatureError, MissingStatisticsError

STATISTICS = {
    "left": {"observation.state": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}, "action": {"mean": [0.0], "std": [1.0]}},
    "right": {"observation.state": {"mean": [5.0, 5.0], "std": [2.0, 2.0]}, "action": {"mean": [3.0], "std": [2.0]}},
}


def several_embodiments(**kwargs):
    return PolicyProcessor(
        input_features={"observation.state": {"type": "STATE", "shape": [2]}},
        output_features={"action": {"type": "ACTION", "shape": [1]}},
        normalization_mapping={"STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        embodiments=STATISTICS,
        **kwargs,
    )


@pytest.mark.parametrize("use", [lambda p: p({"observation.state": [0.0, 0.0]}), lambda p: p.decode_actions([[0.0]])])
def test_several_embodiments_and_none_chosen_lists_them(use):
    with pytest.raises(EmbodimentError, match=r"No embodiment is chosen.*left, right"):
        use(several_embodiments())


def test_the_chosen_embodiments_statistics_are_used():
    processor = several_embodiments()
    processor.choose_embodiment("right")
    torch.testing.assert_close(processor({"observation.state": [7.0, 5.0]})["state"], torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(processor.decode_actions(torch.tensor([[1.0]])), torch.tensor([[5.0]]))
    processor.choose_embodiment("left")
    torch.testing.assert_close(processor({"observation.state": [7.0, 5.0]})["state"], torch.tensor([[7.0, 5.0]]))


def test_an_unknown_embodiment_lists_those_that_exist():
    with pytest.raises(EmbodimentError, match=r"no embodiment 'middle'.*left, right"):
        several_embodiments(embodiment="middle")


def test_a_single_embodiment_needs_no_choice():
    processor = PolicyProcessor(
        {"observation.state": {"type": "STATE", "shape": [2]}},
        {"action": {"type": "ACTION", "shape": [1]}},
        {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        embodiments={"right": STATISTICS["right"]},
    )
    assert processor.embodiment == "right"


def test_embodiments_and_the_choice_survive_saving(tmp_path):
    several_embodiments(embodiment="right").save_pretrained(tmp_path)
    processor = PolicyProcessor.from_pretrained(tmp_path)
    assert processor.embodiment == "right"
    assert list(processor.embodiments) == ["left", "right"]
    torch.testing.assert_close(processor.decode_actions(torch.tensor([[1.0]])), torch.tensor([[5.0]]))


def two_cameras(**kwargs):
    image = {"type": "VISUAL", "shape": [3, 32, 32]}
    torch.manual_seed(0)
    return ACTConfig(
        input_features={
            "observation.images.wrist": image,
            "observation.images.top": image,
            "observation.state": {"type": "STATE", "shape": [2]},
        },
        output_features={"action": {"type": "ACTION", "shape": [2]}},
        normalization_mapping=dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY"),
        pretrained_backbone_weights=None,
        vision_config={"layer_type": "basic", "hidden_sizes": [8] * 4, "depths": [1] * 4, "embedding_size": 8},
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        use_vae=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def optional_top():
    config = two_cameras(optional_cameras=["observation.images.top"])
    policy = ACTPolicy(config).eval()
    return PolicyPipeline(model=policy, processor=PolicyProcessor.from_config(config), device="cpu")


def observation(**images):
    return {"observation.state": np.zeros(2)} | {f"observation.images.{name}": image for name, image in images.items()}


def image(value):
    return np.full((32, 32, 3), value, dtype=np.uint8)


def test_a_required_camera_that_is_missing_raises(optional_top):
    with pytest.raises(MissingFeatureError, match=r"lacks observation\.images\.wrist"):
        optional_top.processor(observation(top=image(9)))


def test_an_optional_camera_may_be_missing(optional_top):
    inputs = optional_top.processor(observation(wrist=image(255)))
    assert inputs["pixel_mask"].tolist() == [[True, False]]
    assert inputs["pixel_values"].shape == (1, 2, 3, 32, 32)
    assert inputs["pixel_values"][0, 1].abs().max() == 0
    assert optional_top.predict_chunk(observation(wrist=image(255))).shape == (4, 2)


def test_the_image_of_an_absent_camera_changes_nothing(optional_top):
    inputs = dict(optional_top.processor(observation(wrist=image(100), top=image(200))))
    inputs["pixel_mask"] = torch.tensor([[True, False]])
    masked = optional_top.policy.predict_action_chunk(**inputs)
    inputs["pixel_values"][:, 1] = 7.0
    assert torch.equal(optional_top.policy.predict_action_chunk(**inputs), masked)
    inputs["pixel_mask"] = torch.tensor([[True, True]])
    assert not torch.equal(optional_top.policy.predict_action_chunk(**inputs), masked)


def test_an_optional_camera_needs_no_statistics_until_it_is_there(tmp_path):
    """No dataset has statistics of a camera that its robot lacks."""
    config = two_cameras(optional_cameras=["observation.images.top"])
    config.normalization_mapping = config.normalization_mapping | {"VISUAL": "MEAN_STD"}
    channels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    processor = PolicyProcessor.from_config(config, {"observation.images.wrist": channels})
    processor.save_pretrained(tmp_path)
    for again in (processor, PolicyProcessor.from_pretrained(tmp_path)):
        pixels = again(observation(wrist=image(255)))["pixel_values"]
        assert pixels[0, :, 0, 0, 0].tolist() == [2.0, 0.0]
        with pytest.raises(MissingStatisticsError, match=r"images\.top is normalised with MEAN_STD, which needs mean"):
            again(observation(wrist=image(255), top=image(9)))
    with pytest.raises(MissingStatisticsError, match=r"images\.wrist is normalised with MEAN_STD, which needs mean"):
        PolicyProcessor.from_config(config, {"observation.images.top": channels})


def test_an_optional_camera_must_be_a_camera():
    with pytest.raises(InvalidConfigError, match=r"'observation\.images\.tip', which is no camera.*top"):
        two_cameras(optional_cameras=["observation.images.tip"])


def ranged(**kwargs):
    torch.manual_seed(0)
    config = ACTConfig(
        input_features={"observation.state": {"type": "STATE", "shape": [2]}},
        output_features={"action": {"type": "ACTION", "shape": [2]}},
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        use_vae=False,
    )
    statistics = {
        "observation.state": {"mean": [0.0, 0.0], "std": [1.0, 1.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]},
        "action": {"mean": [0.0, 0.0], "std": [1.0, 1.0]} | kwargs.pop("limits", {"min": [-1, -9], "max": [1, 9]}),
    }
    processor = PolicyProcessor.from_config(
        config, statistics, dimension_names={"action": ["lift", "turn"]}, units={"action": ["m", "rad"]}
    )
    policy = ACTPolicy(config)
    with torch.no_grad():
        policy.action_head.action_head.bias[0] = 100.0  # far beyond its range
    return PolicyPipeline(model=policy, processor=processor, device="cpu", **kwargs)


def test_actions_outside_the_training_range_are_reported_per_dimension():
    pipeline = ranged()
    assert pipeline.outside_training_range == {"lift": 0.0, "turn": 0.0}
    action = pipeline({"observation.state": [0.0, 0.0]})
    assert action[0] > 50
    assert pipeline.outside_training_range == {"lift": 1.0, "turn": 0.0}
    pipeline.reset()
    assert pipeline.outside_training_range == {"lift": 0.0, "turn": 0.0}


def test_actions_are_clamped_when_asked():
    action = ranged(clamp_actions=True)({"observation.state": [0.0, 0.0]})
    assert action[0] == 1.0
    assert -9 < action[1] < 9


def test_clamping_needs_recorded_limits():
    with pytest.raises(MissingStatisticsError, match="clamp_actions=True needs"):
        ranged(clamp_actions=True, limits={})
    assert ranged(limits={}).outside_training_range == {}


def test_the_contract_prints_names_units_and_ranges():
    text = str(ranged().processor.contract())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        "→ observation.state (2,) MEAN_STD",
        "0 unnamed [unit not recorded] -1 … 1",
        "1 unnamed [unit not recorded] -2 … 2",
        "← action (2,) MEAN_STD",
        "0 lift [m] -1 … 1",
        "1 turn [rad] -9 … 9",
    ]


def test_the_contract_tells_optional_cameras(optional_top):
    assert "observation.images.top  (3, 32, 32)  IDENTITY, optional" in str(optional_top.processor.contract())
