"""The U-Net over time: its condition in two halves, its lengths, its published order."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
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
    expected = [block.cond_encoder(torch.cat([steps, condition], dim=1)) for block in unet.blocks()]
    torch.testing.assert_close(unet.step_films(times) + unet.condition_films(condition), torch.cat(expected, dim=1))


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
    films = unet.step_films(torch.tensor([7])) + unet.condition_films(condition)
    torch.testing.assert_close(unet.denoise(actions, films), each)


def test_adapters_are_called_and_trained():
    unet = build()
    inputs = torch.randn(2, 16, 3), torch.tensor([3, 50]), torch.randn(2, 5)
    before = unet(*inputs)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*(cond_encoder\.1|block\.0)"), unet)
    torch.testing.assert_close(adapted(*inputs), before)
    adapted(*inputs).square().sum().backward()
    grown = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert {"cond_encoder", "conv1"} <= {part for name in grown for part in name.split(".")}
    with torch.no_grad():
        for name, parameter in grown.items():
            assert parameter.grad.abs().sum() > 0, name
            parameter.normal_()
        expected = adapted(*inputs)
        assert not torch.allclose(expected, before, atol=1e-3)
        for module in adapted.modules():
            if hasattr(module, "merge"):
                module.merge()
        torch.testing.assert_close(adapted(*inputs), expected, atol=1e-3, rtol=1e-3)
