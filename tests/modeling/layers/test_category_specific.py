"""Each sample is mapped by the weights of its own category."""

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from manipulators.modeling.layers.category_specific import (
    CategorySpecificActionEncoder,
    CategorySpecificLinear,
    CategorySpecificMLP,
)


def test_linear():
    layer = CategorySpecificLinear(3, 2, 2)
    with torch.no_grad():
        layer.W.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [1.0, 0.0]]]))
        layer.b.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]]))
    x = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]])
    assert layer(x, torch.tensor([1, 2])).tolist() == [[[3.0, 6.0]], [[2.0, 6.0]]]
    assert layer(x, 2).tolist() == [[[2.0, 6.0]], [[2.0, 6.0]]]


def test_one_category_for_all_is_each_ones():
    torch.manual_seed(0)
    x, code = torch.randn(3, 4, 5), torch.randn(3, 6)
    mlp, encoder = CategorySpecificMLP(4, 5, 7, 2), CategorySpecificActionEncoder(4, 5, 6)
    results = []
    for categories in (2, torch.tensor([2, 2, 2])):
        mlp.zero_grad()
        found = mlp(x, categories), encoder(x, code, categories)
        found[0].sum().backward()
        results.append((*found, mlp.layer1.W.grad))
    for shared, own in zip(*results, strict=True):
        torch.testing.assert_close(shared, own)
    assert results[0][2][2].abs().sum() > 0 and results[0][2][[0, 1, 3]].abs().sum() == 0


def test_action_encoder():
    torch.manual_seed(0)
    encoder = CategorySpecificActionEncoder(2, 3, 4)
    actions, code = torch.randn(1, 5, 3), encoder.time_code(torch.tensor([250]))
    expected = torch.tensor([[250.0, 2.5]])
    torch.testing.assert_close(code, torch.cat([expected.sin(), expected.cos()], dim=1))
    w1, w2, w3 = (layer.W[1] for layer in (encoder.W1, encoder.W2, encoder.W3))
    hidden = torch.cat([actions @ w1, code.expand(5, 4)[None]], dim=-1)
    torch.testing.assert_close(encoder(actions, code, 1), F.silu(hidden @ w2) @ w3)


def test_weights_start_by_the_width_of_what_they_map():
    layer = CategorySpecificLinear(8, 64, 64)
    assert abs(layer.W.std().item() - 0.125) < 0.005
    assert layer.b.abs().sum() == 0
