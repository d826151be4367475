"""ACT's components by themselves, and what is special about ACT."""

import pytest
import torch

from manipulators import ACTActionHead, ACTBackbone, ACTPolicy
from manipulators.errors import FeatureShapeError, InvalidConfigError, MissingFeatureError


def dataset_batch(config, batch_size=2):
    """`example_inputs` under the dataset's names."""
    inputs = config.example_inputs(batch_size)
    batch = {
        "observation.state": inputs["state"],
        "action": inputs["actions"],
        "action_is_pad": inputs["action_is_pad"],
    }
    if "pixel_values" in inputs:
        batch |= dict(zip(config.image_features, inputs["pixel_values"].unbind(1), strict=True))
    return batch


@pytest.fixture
def act(tiny_act):
    torch.manual_seed(0)
    return ACTPolicy(tiny_act({"wrist": (3, 32, 32), "above": (3, 32, 32)}, dropout=0.0)).eval()


def test_components_make_the_policy(act):
    batch = dataset_batch(act.config)
    latent, mu, log_sigma_x2 = act.action_head.encode_latent(batch)
    assert torch.equal(latent, torch.zeros(2, 4)) and mu is None and log_sigma_x2 is None
    features, positions = act.backbone.encode_features(batch, latent, return_positions=True)
    assert features.shape == (34, 2, 16)  # latent, state, 4 × 4 pixels of each camera
    assert positions.shape == (34, 1, 16)
    chunk = act.action_head.decode_actions(features, 2, "cpu", positions)
    inputs = act.config.example_inputs(2)
    torch.testing.assert_close(chunk, act.predict_action_chunk(**inputs))


@pytest.mark.parametrize("form", ["list", "stacked", "named"])
def test_images_under_every_name(act, form):
    batch = dataset_batch(act.config)
    expected = act.backbone.encode_features(batch, torch.zeros(2, 4))
    views = [batch.pop(name) for name in act.config.image_features]
    if form == "named":
        batch |= dict(zip(reversed(act.config.image_features), reversed(views), strict=True))
    else:
        batch["observation.images"] = views if form == "list" else torch.stack(views, dim=1)
    torch.testing.assert_close(act.backbone.encode_features(batch, torch.zeros(2, 4)), expected)


def test_cameras_of_two_sizes_keep_their_order(tiny_act):
    torch.manual_seed(0)
    backbone = ACTBackbone(tiny_act({"b": (3, 32, 64), "a": (3, 32, 32), "c": (3, 32, 64)})).eval()
    views = [torch.randn(2, 3, 32, 64), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 64)]
    maps = backbone.encode_images(views)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 8), (2, 16, 4, 4), (2, 16, 4, 8)]
    for view, encoded in zip(views, maps, strict=True):
        torch.testing.assert_close(backbone.encode_images([view])[0], encoded)


def test_latent_is_drawn_from_the_actions(act):
    batch = dataset_batch(act.config)
    noise = torch.tensor([[0.5, -1.0, 2.0, 0.0]] * 2)
    head = act.action_head.train()
    latent, mu, log_variance = head.encode_latent(batch, noise)
    torch.testing.assert_close(latent, mu + torch.exp(log_variance / 2) * noise)
    assert torch.equal(head.encode_latent(batch, noise)[0], latent)
    assert not torch.equal(head.encode_latent(batch)[0], head.encode_latent(batch)[0])


def test_loss_is_the_masked_l1_plus_the_weighted_divergence(act):
    inputs = act.config.example_inputs(2)
    inputs["action_is_pad"][0, 3:] = True
    noise = torch.zeros(2, 4)
    output = act.train()(**inputs, noise=noise)
    _, mu, log_variance = act.action_head.encode_latent(inputs, noise)
    kl = sum(
        -0.5 * (1 + ls - m**2 - 2.718281828459045**ls)
        for row in range(2)
        for m, ls in zip(mu[row].tolist(), log_variance[row].tolist(), strict=True)
    )
    error = (output.actions - inputs["actions"]).abs()
    l1 = (error[0, :3].sum() + error[1].sum()) / (8 * 2)
    torch.testing.assert_close(output.losses["l1"], l1)
    assert output.losses["kl"].item() == pytest.approx(kl / 2, rel=1e-4)
    assert output.loss.item() == pytest.approx((l1 + 10 * kl / 2).item(), rel=1e-4)
    assert act.eval()(**inputs).losses.keys() == {"l1"}


def test_head_refuses_features_of_another_batch(act):
    with pytest.raises(FeatureShapeError, match="encoder_out"):
        act.action_head.decode_actions(torch.zeros(4, 2, 16), 3, "cpu")


def test_missing_camera_in_a_dataset_batch(act):
    batch = dataset_batch(act.config)
    del batch["observation.images.above"]
    with pytest.raises(MissingFeatureError, match="pixel_values"):
        act.backbone.encode_features(batch, torch.zeros(2, 4))


@pytest.mark.parametrize("component", [ACTPolicy, ACTBackbone, ACTActionHead])
def test_config_without_features(component, tiny_act):
    config = tiny_act()
    config.input_features = {}
    with pytest.raises(InvalidConfigError, match="no input features"):
        component(config)


@pytest.mark.parametrize("component", [ACTPolicy, ACTBackbone, ACTActionHead])
def test_config_is_validated_when_built(component, tiny_act):
    config = tiny_act()
    config.n_heads = 3
    with pytest.raises(InvalidConfigError, match="dim_model=16 must be a multiple of n_heads=3"):
        component(config)


def test_start_values_are_the_papers(tiny_act):
    """Xavier in encoder and decoder, torch's own in the VAE's; the query and position tables are N(0, 1)."""
    torch.manual_seed(0)
    policy = ACTPolicy(tiny_act(dim_model=64, n_heads=2, dim_feedforward=128, n_decoder_layers=1, chunk_size=50))
    bound = (6 / (64 + 128)) ** 0.5
    weight = policy.backbone.encoder.layers[0].linear1.weight
    assert 0.97 * bound < weight.abs().max() <= bound
    vae_weight = policy.action_head.vae_encoder.layers[0].linear1.weight
    assert 0.97 / 8 < vae_weight.abs().max() <= 1 / 8
    assert policy.action_head.decoder_pos_embed.weight.std().item() == pytest.approx(1, abs=0.05)


def test_vision_batch_norm_is_frozen(act):
    before = {name: buffer.clone() for name, buffer in act.backbone.named_buffers()}
    act.train()(**act.config.example_inputs(2)).loss.backward()
    assert before and not any("normalization" in name for name, _ in act.backbone.named_parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in act.backbone.named_buffers())
