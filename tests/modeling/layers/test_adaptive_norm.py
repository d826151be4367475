"""Adaptive RMSNorm by hand."""

import torch

from manipulators.modeling.layers.adaptive_norm import AdaptiveRMSNorm, ExpertModulation, start_modulation


def test_scale_shift_and_gate_in_this_order():
    """Mean square 12.5 of (3, 4) and of eps 12.5: divided by 5."""
    norm = AdaptiveRMSNorm(2, eps=12.5)
    modulation = torch.tensor([10.0, 20.0, 1.0, 2.0, 0.5, 0.25])
    out, gate = norm(torch.tensor([[[3.0, 4.0]]]), modulation)
    assert out.tolist() == [[[7.0, 18.0]]] and gate.tolist() == [0.5, 0.25]
    out, gate = norm(torch.tensor([[[3.0, 4.0]]], dtype=torch.bfloat16), modulation)
    assert out.dtype == gate.dtype == torch.bfloat16 and out.tolist() == [[[7.0, 18.0]]]


def test_modulations_of_a_fresh_network():
    """The two norms of each layer, then the last; the condition has no influence yet, and gates are not shut."""
    modulation = ExpertModulation(4, layers=2)
    linears = [x for x in modulation.modules() if isinstance(x, torch.nn.Linear)]
    for linear in linears:
        linear.start_weights(linear)
    assert start_modulation is linears[0].start_weights
    found = modulation(torch.randn(3, 1, 4)).unflatten(-1, (5, 3, 4))
    biases = torch.stack([linear.bias for linear in linears]).unflatten(-1, (3, 4))
    torch.testing.assert_close(found[:, 0], (biases + torch.tensor([1.0, 0, 0])[:, None]).expand(3, -1, -1, -1))
    assert biases.abs().max() <= 0.5 and biases.abs().min() > 0
