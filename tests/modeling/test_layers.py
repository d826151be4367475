"""The blocks that policies share, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from manipulators.errors import InvalidConfigError
from manipulators.modeling.layers.positional import sinusoidal_1d, sinusoidal_2d
from manipulators.modeling.layers.resnet import FrozenBatchNorm2d, build_resnet

TINY = {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}


def test_sinusoid_over_time():
    table = sinusoidal_1d(3, 4)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_sinusoid_over_an_image():
    table = sinusoidal_2d(2, 3, 4, like=torch.zeros(1))  # one frequency per axis
    assert table.shape == (6, 4)
    y, x = 2 * (2 * math.pi / 2), 1 * (2 * math.pi / 3)  # row 1, column 0 of a 2 × 3 map; positions count from 1
    expected = [math.sin(y), math.cos(y), math.sin(x), math.cos(x)]
    torch.testing.assert_close(table[3], torch.tensor(expected), atol=1e-5, rtol=0)


def test_frozen_batch_norm_equals_batch_norm_in_evaluation_and_never_learns():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    frozen = FrozenBatchNorm2d.from_batch_norm(norm)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(frozen.train()(x), norm.eval()(x))
    assert not list(frozen.parameters())
    assert sorted(frozen.state_dict()) == ["bias", "running_mean", "running_var", "weight"]
    assert torch.equal(frozen.running_mean, norm.running_mean)


def test_resnet_with_frozen_norms_has_no_other():
    resnet = build_resnet("own", TINY, norm="frozen_batch")
    kinds = {type(module) for module in resnet.modules()}
    assert FrozenBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    assert resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 16, 4, 4)


def test_resnet_takes_start_weights_from_a_folder(tmp_path):
    start = build_resnet("own", TINY)
    start.save_pretrained(tmp_path)
    loaded = build_resnet("own", TINY, pretrained=str(tmp_path))
    for name, value in start.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_resnet_refuses_start_weights_of_another_network(tmp_path):
    build_resnet("own", TINY).save_pretrained(tmp_path)
    with pytest.raises(InvalidConfigError, match="depths differ"):
        build_resnet("own", TINY | {"depths": [1, 2]}, pretrained=str(tmp_path))


def test_resnet_refuses_start_weights_that_are_not_there(tmp_path):
    with pytest.raises(InvalidConfigError, match="pretrained_backbone_weights=None"):
        build_resnet("own", TINY, pretrained=str(tmp_path / "nowhere"))
