"""Frozen batch norm, folded into its convolution: the numbers and names of the network it replaces."""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from manipulators.modeling.layers.resnet import FrozenConvLayer, build_resnet

TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def trained_resnet():
    torch.manual_seed(0)
    resnet = ResNetModel(ResNetConfig(**TINY)).eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return resnet


def frozen_copy(resnet):
    frozen = build_resnet("tiny", TINY, freeze_batch_norm=True)
    weights = {name: value for name, value in resnet.state_dict().items() if not name.endswith("num_batches_tracked")}
    frozen.load_state_dict(weights)
    return frozen.train()  # frozen means: training changes nothing


def test_folded_equals_batch_norm_at_inference():
    resnet = trained_resnet()
    images = torch.randn(2, 3, 32, 48)
    expected = resnet(images).last_hidden_state
    frozen = frozen_copy(resnet)
    torch.testing.assert_close(frozen(images).last_hidden_state, expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(frozen(channels_last).last_hidden_state, expected)


def test_only_convolutions_are_trained_and_get_the_same_gradients():
    resnet = trained_resnet()
    frozen = frozen_copy(resnet)
    assert all(name.endswith("convolution.weight") for name, _ in frozen.named_parameters())
    images = torch.randn(2, 3, 32, 48)
    for network in (resnet, frozen):
        network(images).last_hidden_state.square().mean().backward()
    theirs = dict(resnet.named_parameters())
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


class Doubled(nn.Module):
    """Stand for an adapter: it wraps a convolution and changes what it returns."""

    def __init__(self, convolution):
        super().__init__()
        self.base_layer = convolution

    def forward(self, x):
        return 2 * self.base_layer(x)


def test_an_adapter_around_the_convolution_is_called():
    layer = next(m for m in frozen_copy(trained_resnet()).modules() if isinstance(m, FrozenConvLayer))
    images = torch.randn(1, 3, 16, 16)
    layer.convolution = Doubled(layer.convolution)
    wrapped = layer(images)
    with torch.no_grad():
        layer.convolution.base_layer.weight.mul_(2)
    layer.convolution = layer.convolution.base_layer
    torch.testing.assert_close(wrapped, layer(images))
