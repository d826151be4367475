"""The U-Net over time: its condition in two halves, its lengths, its published order."""

import pytest
import torch
from torch import nn

from manipulators import DiffusionConfig
from manipulators.modeling.layers.unet1d import ConditionalUnet1d, TimestepEmbedding


def build(**fields):
    torch.manual_seed(0)
    sizes = {"down_dims": (16, 32, 24), "n_groups": 4, "diffusion_step_embed_dim": 8, "action_dim": 3}
    return ConditionalUnet1d(DiffusionConfig(**(sizes | fields)), condition_width=5)


def test_timestep_embedding():
    found = TimestepEmbedding(4)(torch.tensor([0, 2]))
    # Frequencies 1 and 1e-4: sines first, then cosines.
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.9092974, 0.0002, -0.4161468, 1.0]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scales", [True, False])
def test_halves_of_the_condition_make_the_published_layer(scales):
    unet = build(use_film_scale_modulation=scales)
    times, condition = torch.tensor([3, 50]), torch.randn(2, 5)
    steps = unet.diffusion_step_encoder(times)
    for block, of_step, of_condition in zip(
        unet.blocks(), unet.step_films(times), unet.condition_films(condition), strict=True
    ):
        expected = block.cond_encoder(torch.cat([steps, condition], dim=1))
        torch.testing.assert_close(of_step + of_condition, expected)


@pytest.mark.parametrize("widths", [(16,), (16, 32), (16, 32, 24, 8)])
@pytest.mark.parametrize("horizon", [16, 48])
def test_length_is_kept(widths, horizon):
    unet = build(down_dims=widths)
    actions = torch.randn(2, horizon, 3)
    assert unet(actions, torch.tensor([1, 2]), torch.randn(2, 5)).shape == (2, horizon, 3)
    assert len(unet.blocks()) == 2 * (2 * len(widths))


def test_film_scales_without_one_plus():
    block = build().down_modules[0][0]
    nn.init.zeros_(block.conv2.block[0].weight)
    film = torch.zeros(2, 32)
    silent = block(torch.randn(2, 3, 16), film)
    h = block.conv2.block[1:](block.conv2.block[0].bias[None, :, None].expand(2, 16, 16))
    assert silent.shape == h.shape == (2, 16, 16)
    seen = []
    block.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    film[:, 16:] = 0.5
    block(torch.randn(2, 3, 16), film)
    torch.testing.assert_close(seen[0], torch.full((2, 16, 16), 0.5))


def test_last_norm_has_eight_groups_whatever_the_others_have():
    assert build(n_groups=4).final_conv[0].block[1].num_groups == 8


def test_one_timestep_for_the_whole_batch_equals_one_each():
    unet = build()
    actions, condition = torch.randn(2, 16, 3), torch.randn(2, 5)
    each = unet(actions, torch.tensor([7, 7]), condition)
    films = [film[0] for film in unet.step_films(torch.tensor([7]))]
    torch.testing.assert_close(unet.denoise(actions, films, unet.condition_films(condition)), each)
