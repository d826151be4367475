"""Batches whose samples differ: each is prepared and learned from as it would be alone, for every policy."""

import runpy
from pathlib import Path

import pytest
import torch

from manipulators.configuration.contract import Contract, of_robot
from manipulators.errors import EmbodimentError
from manipulators.modeling import registry
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer
from manipulators.training.collator import PolicyCollator

CASES = runpy.run_path(str(Path(__file__).parents[1] / "policy_cases.py"))["CASES"]
COMPLETE = [name for name, case in CASES.items() if case.complete]
OF_ROBOTS = ["pi0", "pi05", "gr00t_n1_5", "gr00t_n1"]
STATE, ACTION = "observation.state", "action"
WIDTHS = {"long": (3, 2), "short": (2, 1)}  # of state and action
TASKS = ["push", "push the red button", "pull"]


def sample_of(config, number, widths=None):
    """Return a sample whose pictures come in another size, order or type with every number."""
    generator = torch.Generator().manual_seed(number)
    sample = {"task": TASKS[number % 3], "action_is_pad": torch.zeros(config.action_horizon, dtype=torch.bool)}
    history = (config.n_obs_steps,) if config.n_obs_steps > 1 else ()
    for name, feature in config.input_features.items():
        shape = feature.shape
        if name in config.image_features:
            if config.resizes_pictures and number % 2:
                shape = (shape[0], shape[1] + 6, shape[2] + 2)
            picture = torch.randint(256, (*history, *shape), generator=generator, dtype=torch.uint8)
            picture = picture.movedim(-3, -1) if number % 3 == 1 else picture
            sample[name] = picture / 255 if number % 3 == 2 else picture
        else:
            width = widths[0] if widths and name == STATE else shape[0]
            sample[name] = torch.rand(*history, width, generator=generator)
    width = widths[1] if widths else config.output_features[ACTION].shape[0]
    sample[ACTION] = torch.rand(config.action_horizon, width, generator=generator)
    if number == 3:
        sample["action_is_pad"][1:] = True
    for name in config.optional_cameras if number in (1, 3) else ():
        del sample[name]
    return sample


def require_equal(together, alone):
    """Check that every row of a batch is the sample's own, but for the padding of its prompt."""
    for row, batch in enumerate(alone):
        assert batch.keys() == together.keys()
        for name, values in batch.items():
            whole = together[name]
            if name == "input_ids":
                real = together["attention_mask"][row].bool()
                assert whole[row][real].tolist() == values[0][batch["attention_mask"][0].bool()].tolist()
            elif isinstance(values, list):
                assert all(torch.equal(v[row], own[0]) for v, own in zip(whole, values, strict=True)), name
            elif name != "attention_mask":
                torch.testing.assert_close(whole[row], values[0], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_batch_of_different_pictures_is_that_of_its_samples(name, processor_of):
    config = CASES[name].config()
    collator = PolicyCollator(processor_of(config))
    samples = [sample_of(config, number) for number in range(5)]
    require_equal(collator(samples), [collator([sample]) for sample in samples])


def test_pictures_that_the_network_resizes_are_resized_where_they_differ(processor_of, tiny_diffusion):
    cameras = {"wrist": (3, 32, 32), "above": (3, 24, 48)}
    config = tiny_diffusion(cameras, resize_shape=(20, 20), crop_shape=None, noise_scheduler_type="DDIM")
    torch.manual_seed(0)
    policy = registry.policy_class(config.model_type)(config).eval()
    collator = PolicyCollator(processor_of(config))
    samples = [sample_of(config, number) for number in (0, 1)]
    together, alone = collator(samples), [collator([sample]) for sample in samples]
    assert together["pixel_values"].shape[-2:] == (20, 20)
    noise = torch.randn(2, config.action_horizon, config.action_dim)
    predicted = policy.predict_action_chunk(**together, noise=noise)
    for i, batch in enumerate(alone):
        own = policy.predict_action_chunk(**batch, noise=noise[i : i + 1])
        torch.testing.assert_close(predicted[i : i + 1], own, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=OF_ROBOTS)
def of_robots(request, statistics_of):
    """The config of a policy, and its processor for two robots of different widths."""
    config = CASES[request.param].config()
    fields = {
        "input_features": config.input_features | {STATE: {"type": "STATE", "shape": (3,)}},
        "output_features": {ACTION: {"type": "ACTION", "shape": (2,)}},
    }
    if hasattr(config, "embodiment_ids"):
        fields |= {"embodiment_ids": {"long": 0, "short": 1}, "embodiment_tag": "long"}
    own = {field: getattr(config, field) for field in config.field_names()} | fields
    config = type(config)(**own)
    whole = statistics_of(config)
    embodiments, features = {}, {}
    for robot, (state, action) in WIDTHS.items():
        shift = 0.0 if robot == "long" else 0.5
        cut = {STATE: state, ACTION: action}
        embodiments[robot] = {
            feature: {key: [value + shift for value in values[: cut.get(feature)]] for key, values in found.items()}
            for feature, found in whole.items()
        }
        features[robot] = {
            feature: {"shape": [cut[feature]], "names": [f"{robot}_{i}" for i in range(cut[feature])], "units": None}
            for feature in cut
        } | {camera: {"shape": list(shape.shape)} for camera, shape in config.image_features.items()}
    processor = processor_class(config).from_config(
        config,
        tokenizer=word_tokenizer(TASKS),
        embodiments=embodiments,
        embodiment=None,
        embodiment_features=features,
    )
    processor.check_agreement(config)
    return config, processor


def robot_samples(config):
    robots = ["long", "short", "short", "long", "short"]
    return [sample_of(config, i, WIDTHS[robot]) | {"embodiment": robot} for i, robot in enumerate(robots)]


def test_a_batch_of_two_robots_is_that_of_its_samples(of_robots):
    config, processor = of_robots
    collator, samples = PolicyCollator(processor), robot_samples(config)
    batch = collator(samples)
    require_equal(batch, [collator([sample]) for sample in samples])
    widths = batch["action_mask"].any(1).sum(-1).tolist()
    assert widths == [2, 1, 1, 2, 1]
    if "embodiment_id" in batch:
        assert batch["embodiment_id"].tolist() == [0, 1, 1, 0, 1]
    low, high = processor.for_embodiment("short").robots.statistics_in_use(ACTION), batch["actions"][1, 0, 0].item()
    raw = samples[1][ACTION][0, 0].item()
    expected = {
        "MEAN_STD": (raw - low["mean"][0]) / low["std"][0],
        "MIN_MAX": 2 * (raw - low["min"][0]) / (low["max"][0] - low["min"][0]) - 1,
        "QUANTILES": 2 * (raw - low["q01"][0]) / (low["q99"][0] - low["q01"][0]) - 1,
    }[config.normalization_mapping["ACTION"].value]
    assert high == pytest.approx(expected, abs=1e-5)


def test_the_loss_of_two_robots_is_that_of_each(of_robots):
    """Padded dimensions count in no loss, and each sample's part is what it would be alone."""
    config, processor = of_robots
    torch.manual_seed(0)
    policy = registry.policy_class(config.model_type)(config).eval()
    collator, samples = PolicyCollator(processor), robot_samples(config)[:2]
    draws = {"noise": torch.randn(2, config.action_horizon, config.model_action_dim), "time": torch.tensor([0.3, 0.8])}
    batch = collator(samples)
    mask = batch["attention_mask"]
    if hasattr(config, "mask_padding"):
        policy.action_head.config.mask_padding = True  # as published, prompts of a batch see each other's padding
    with torch.no_grad():
        together = policy(**batch, **draws)
        alone = [
            policy(**collator([sample]), noise=draws["noise"][i : i + 1], time=draws["time"][i : i + 1])
            for i, sample in enumerate(samples)
        ]
    assert mask.shape[0] == 2
    sums = torch.cat([output.sample_errors for output in alone])
    torch.testing.assert_close(together.sample_errors, sums, rtol=1e-4, atol=1e-5)
    assert sums[:, 1].tolist() == [config.action_horizon * 2, config.action_horizon]
    assert together.loss.item() == pytest.approx((sums[:, 0].sum() / sums[:, 1].sum()).item(), rel=1e-4)


def test_a_processor_of_two_robots_serves_the_one_that_is_chosen(of_robots, tmp_path):
    config, processor = of_robots
    processor.save_pretrained(tmp_path / "once")
    loaded = type(processor).from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/processor_config.json").read_bytes() == (
        tmp_path / "twice/processor_config.json"
    ).read_bytes()
    assert loaded.embodiment is None
    with pytest.raises(EmbodimentError, match=r"No embodiment is chosen\. .*long, short"):
        loaded.normalizer(ACTION)
    saved = loaded.to_dict()
    loaded.choose_embodiment("short")
    loaded.check_agreement(config)
    assert loaded.input_features[STATE].shape == (2,) and loaded.output_features[ACTION].shape == (1,)
    assert loaded.dimension_names[STATE] == ["short_0", "short_1"]
    assert loaded.decode_actions(torch.zeros(2, config.action_horizon, config.model_action_dim)).shape[-1] == 1
    assert loaded.to_dict() == saved | {"embodiment": "short"}
    assert [d.name for d in loaded.contract().outputs[0].dimensions] == ["short_0"]
    assert [d.name for d in Contract.from_fields(of_robot(saved, "long")).outputs[0].dimensions] == [
        "long_0",
        "long_1",
    ]
    loaded.choose_embodiment("long")
    assert loaded.output_features[ACTION].shape == (2,)
    with pytest.raises(EmbodimentError, match="no embodiment 'wide'"):
        PolicyCollator(processor)([sample_of(config, 0, WIDTHS["long"]) | {"embodiment": "wide"}])
