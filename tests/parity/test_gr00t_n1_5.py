"""GR00T N1.5 reproduces the reference implementation's policy, and has the published model's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from manipulators import GR00TN1_5Config, GR00TN1_5Policy, load_published
from manipulators.conversion.gr00t import rename_gr00t_weights

SLOTS = {"gr1": 2, "new_embodiment": 5}  # of the six that the golden's head has
TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "gr00t_n1_5_policy_tiny"
    case = json.loads((folder / "case.json").read_text())["config"]
    arrays = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return case, arrays


@pytest.fixture(scope="module")
def build(golden):
    """Return a function: keywords of the config → the golden's policy with the reference's weights."""
    case, arrays = golden

    def build_policy(**fields):
        config = GR00TN1_5Config(**case, embodiment_ids=SLOTS, **fields)
        return load_published(GR00TN1_5Policy(config).eval(), arrays["weights"])

    return build_policy


@pytest.fixture(scope="module")
def inputs(golden):
    """The padded batch under our names: two cameras, the first sample without padding."""
    given = golden[1]["inputs"]
    return {
        "pixel_values": given["eagle_pixel_values"].unflatten(0, (2, 2)),
        "input_ids": given["eagle_input_ids"],
        "attention_mask": given["eagle_attention_mask"],
        "state": given["state"],
        "embodiment_id": given["embodiment_id"],
    }


@pytest.fixture(scope="module")
def labels(golden):
    given = golden[1]["inputs"]
    return {
        "actions": given["action"],
        "action_mask": given["action_mask"],
        "noise": given["noise"],
        "time": (0.999 - given["beta_sample"]) / 0.999,
    }


def test_features(golden, build, inputs):
    features = build().backbone.encode_prompts(
        inputs["pixel_values"].flatten(0, 1), inputs["input_ids"], inputs["attention_mask"]
    )
    torch.testing.assert_close(features, golden[1]["outputs"]["backbone_features_fa2_emulated"], **TOLERANCE)


@pytest.mark.parametrize(("kernel", "name"), [("sdpa", "fa2_emulated"), ("eager", "eager")])
def test_loss_and_actions(golden, build, inputs, labels, kernel, name):
    """On padding an eager kernel gives other features, and the published model looks at them."""
    policy = build(attention_implementation=kernel, loss_over="steps")
    outputs = golden[1]["outputs"]
    loss = policy(**inputs, **labels).loss
    torch.testing.assert_close(loss, outputs[f"loss_{name}"][0], **TOLERANCE)
    actions = policy.predict_action_chunk(**inputs, noise=golden[1]["inputs"]["inference_init_noise"])
    torch.testing.assert_close(actions, outputs[f"action_pred_{name}"], **TOLERANCE)


def test_components_by_themselves(golden, build, inputs):
    """The whole policy's weights load into a backbone or a head, which have no `backbone.` in their names."""
    policy, weights = build(), golden[1]["weights"]
    for part in (policy.backbone, policy.action_head):
        before = {name: value.clone() for name, value in part.state_dict().items()}
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.zero_()
        load_published(part, weights)
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_and_its_batch(golden, build, inputs, labels, masked):
    """The published model looks at padding, so that the longest prompt of a batch changes the others' actions."""
    policy = build(mask_padding=masked)
    shorter = {name: value[1:] for name, value in inputs.items()}
    real = shorter["attention_mask"][0].bool()
    shorter["input_ids"], shorter["attention_mask"] = shorter["input_ids"][:, real], shorter["attention_mask"][:, real]
    noise = golden[1]["inputs"]["inference_init_noise"]
    together = policy.predict_action_chunk(**inputs, noise=noise)[1:]
    alone = policy.predict_action_chunk(**shorter, noise=noise[1:])
    assert torch.allclose(together, alone, atol=1e-5) == masked
    real_steps = labels | {"action_mask": labels["action_mask"] * torch.tensor([0, 1])[:, None, None]}
    together = policy(**inputs, **real_steps).loss
    alone = policy(**shorter, **{name: value[1:] for name, value in labels.items()}).loss
    assert torch.allclose(together, alone, atol=1e-5) == masked


def test_the_published_model_has_these_weights(shared):
    """Names and shapes at real size, without storage; what nothing reads is left out."""
    table = json.loads((shared / "specs" / "gr00t_n1_5_keys.json").read_text())
    with torch.device("meta"):
        policy = GR00TN1_5Policy(GR00TN1_5Config())
    assert {n: tuple(v.shape) for n, v in policy.state_dict().items()} == {
        name: tuple(shape) for name, shape in rename_gr00t_weights(table).items()
    }
