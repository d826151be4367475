"""The norms of a ResNet. Frozen batch norm, folded into its convolution, keeps the numbers and names it replaces."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from manipulators.configuration.act import ACTConfig
from manipulators.errors import InvalidConfigError
from manipulators.modeling.layers.resnet import FrozenBatchNorm2d, FrozenConvLayer, build_resnet
from manipulators.modeling.policies.act import ACTPolicy

TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
SMALL = {"layer_type": "basic", "embedding_size": 32, "hidden_sizes": [32, 48], "depths": [1, 1]}


def trained_resnet():
    torch.manual_seed(0)
    resnet = ResNetModel(ResNetConfig(**TINY)).eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return resnet


def frozen_copy(resnet):
    frozen = build_resnet("tiny", TINY, norm="frozen_batch")
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


def norms(module, kind):
    return [part for part in module.modules() if isinstance(part, kind)]


def test_every_norm_is_replaced():
    assert len(norms(build_resnet("small", SMALL), nn.BatchNorm2d)) == 6
    frozen = build_resnet("small", SMALL, norm="frozen_batch")
    assert len(norms(frozen, FrozenBatchNorm2d)) == 6
    assert not norms(frozen, nn.BatchNorm2d)
    group = build_resnet("small", SMALL, norm="group")
    assert [(norm.num_groups, norm.num_channels) for norm in norms(group, nn.GroupNorm)] == [(2, 32)] * 3 + [
        (3, 48)
    ] * 3
    assert not norms(group, nn.BatchNorm2d)


def test_group_norm_normalises_what_a_frozen_batch_norm_lets_pass():
    x = 100 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stem = build_resnet("small", SMALL, norm="group").embedder.embedder
        y = stem.normalization(stem.convolution(x)).unflatten(1, (2, 16))  # (b, groups, 16, h, w)
    torch.testing.assert_close(y.mean(dim=(2, 3, 4)), torch.zeros(4, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(dim=(2, 3, 4)), torch.ones(4, 2), atol=1e-2, rtol=0)


def test_a_norm_that_does_not_exist_or_does_not_fit_is_refused():
    with pytest.raises(InvalidConfigError, match="'group'"):
        build_resnet("small", SMALL, norm="grup")
    with pytest.raises(InvalidConfigError, match="trained with batch norm"):
        build_resnet("resnet18", pretrained="microsoft/resnet-18", norm="group")
    with pytest.raises(InvalidConfigError, match="pretrained_backbone_weights=None"):
        ACTConfig(vision_norm="group").validate()


def test_the_norm_is_saved_with_the_policy(tmp_path):
    config = ACTConfig(
        input_features={"observation.images.front": {"type": "VISUAL", "shape": [3, 32, 32]}},
        output_features={"action": {"type": "ACTION", "shape": [1]}},
        chunk_size=2,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_vae=False,
        vision_config=SMALL,
        vision_norm="group",
        pretrained_backbone_weights=None,
    )
    policy = ACTPolicy(config).eval()
    policy.save_pretrained(tmp_path)
    again = ACTPolicy.from_pretrained(tmp_path)
    assert again.config.vision_norm == "group"
    inputs = config.example_inputs()
    assert torch.equal(again.predict_action_chunk(**inputs), policy.predict_action_chunk(**inputs))
    assert ACTConfig().vision_norm == "frozen_batch"
