"""Matrix products give what torch's convolutions give, gradients included."""

import pytest
import torch
from torch import nn

from manipulators.modeling.layers.time_conv import TimeConv1d, TimeUpsample1d


def check_equal(layer, reference, x):
    reference.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, reference):
        y = module(x.clone().requires_grad_())
        (y * torch.arange(y.shape[-1])).sum().backward()
        results.append((y, module.weight.grad, module.bias.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_convolution(kernel, stride, steps):
    torch.manual_seed(0)
    options = {"stride": stride, "padding": kernel // 2}
    check_equal(TimeConv1d(6, 8, kernel, **options), nn.Conv1d(6, 8, kernel, **options), torch.randn(3, 6, steps))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_upsampling(steps):
    torch.manual_seed(0)
    check_equal(TimeUpsample1d(6), nn.ConvTranspose1d(6, 6, 4, stride=2, padding=1), torch.randn(3, 6, steps))


def test_parameters_start_as_torchs_do():
    torch.manual_seed(0)
    layer = TimeConv1d(6, 8, 5, padding=2)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Conv1d(6, 8, 5, padding=2).weight)
