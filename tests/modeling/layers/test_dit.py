"""The blocks of GR00T's transformers, against diffusers' parts and formulas written out."""

import pytest
import torch
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import SinusoidalPositionalEmbedding as DiffusersPositions
from diffusers.models.embeddings import TimestepEmbedding as DiffusersTimestepEmbedding
from diffusers.models.embeddings import Timesteps
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from manipulators.configuration.flow_matching import DiTConfig, SelfAttentionTransformerConfig
from manipulators.modeling.layers.dit import (
    Attention,
    DiT,
    FeedForward,
    SelfAttentionTransformer,
    SinusoidalPositionalEmbedding,
    TimestepEncoder,
    modulated_norm,
)


def dit(**fields):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 4, "output_dim": 6}
    return DiT(DiTConfig(**(sizes | {"cross_attention_dim": 10, "positional_embeddings": None} | fields))).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 5, 8), torch.randn(2, 7, 10), torch.tensor([31, 700])


@pytest.mark.parametrize("context_dim", [None, 10])
def test_attention(context_dim):
    torch.manual_seed(0)
    ours = Attention(2, 4, context_dim, dropout=0.0, bias=True)
    reference = DiffusersAttention(8, heads=2, dim_head=4, cross_attention_dim=context_dim, bias=True)
    reference.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 5, 8), None if context_dim is None else torch.randn(2, 7, 10)
    found = ours(x, None if context is None else ours.keys_values(context))
    torch.testing.assert_close(found, reference(x, encoder_hidden_states=context))


@pytest.mark.parametrize("activation", ["gelu-approximate", "gelu"])
@pytest.mark.parametrize("final_dropout", [True, False])
def test_feed_forward(activation, final_dropout):
    ours = FeedForward(8, activation, dropout=0.1, final_dropout=final_dropout)
    reference = DiffusersFeedForward(8, dropout=0.1, activation_fn=activation, final_dropout=final_dropout)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x))
    assert [type(part).__name__ for part in ours.net[1:]] == [type(part).__name__ for part in reference.net[1:]]


def test_timestep_encoder():
    ours = TimestepEncoder(8)
    reference = DiffusersTimestepEmbedding(256, 8)
    reference.load_state_dict(ours.timestep_embedder.state_dict())
    waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
    timesteps = torch.tensor([0, 1, 499, 999])
    torch.testing.assert_close(ours(timesteps), reference(waves(timesteps)))


def test_positions():
    ours, reference = SinusoidalPositionalEmbedding(12, 8), DiffusersPositions(8, max_seq_length=12)
    torch.testing.assert_close(ours.pe, reference.pe)
    assert list(ours.state_dict()) == list(reference.state_dict()) == ["pe"]
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(x), reference(x))
    expected = ours.pe.clone()
    ours.pe.zero_()
    ours.reset_parameters()
    assert torch.equal(ours.pe, expected)


def test_modulated_norm():
    x, gain, shift = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    expected = F.layer_norm(x, (8,), eps=1e-6) * gain[:, None] + shift[:, None]
    torch.testing.assert_close(modulated_norm(x, (gain, shift), 1e-6), expected)
    torch.testing.assert_close(modulated_norm(x[1:], (gain[1], shift[1]), 1e-6), expected[1:])


def test_order_of_gain_and_shift():
    """A block's linear gives the gain first, the output's the shift."""
    network = dit(num_layers=1)
    with torch.no_grad():
        for linear in (network.transformer_blocks[0].norm1.linear, network.proj_out_1):
            linear.weight.zero_()
            linear.bias.copy_(torch.cat([torch.full((8,), 1.0), torch.full((8,), 3.0)]))
    gain, shift = network.transformer_blocks[0].norm1.modulation(torch.randn(1, 8))
    assert gain.tolist() == [[2.0] * 8] and shift.tolist() == [[3.0] * 8]
    x = torch.randn(1, 2, 8)
    (block,) = network.prepare(torch.randn(1, 3, 10), torch.tensor([0])).blocks
    output = network.prepare(torch.randn(1, 3, 10), torch.tensor([0])).output
    assert block.modulation[0].tolist() == [[2.0] * 8]
    assert output[0].tolist() == [[4.0] * 8] and output[1].tolist() == [[1.0] * 8]
    expected = network.proj_out_2(F.layer_norm(x, (8,), eps=1e-6) * 4 + 1)
    torch.testing.assert_close(network._output(x, (output[0][0], output[1][0])), expected)


def test_interleaved_blocks():
    x, features, timesteps = inputs()
    network = dit(interleave_self_attention=True)
    widths = [block.attn1.to_k.in_features for block in network.transformer_blocks]
    assert widths == [10, 8, 10, 8]
    assert [block.attn1.to_k.in_features for block in dit().transformer_blocks] == [10] * 4
    # Where tokens attend to features only, one token's output does not depend on the others.
    for interleaved, independent in ((False, True), (True, False)):
        network = dit(interleave_self_attention=interleaved)
        alone = network(x[:, :1], features, timesteps)
        assert torch.allclose(network(x, features, timesteps)[:, :1], alone, atol=1e-6) == independent


@pytest.mark.parametrize("norm_type", ["ada_norm", "layer_norm"])
@pytest.mark.parametrize("positions", ["sinusoidal", None])
def test_prepared_steps_equal_forward(norm_type, positions):
    x, features, _ = inputs()
    network = dit(norm_type=norm_type, positional_embeddings=positions, interleave_self_attention=True)
    timesteps = torch.tensor([0, 250, 500])
    prepared = network.prepare(features, timesteps)
    for i, timestep in enumerate(timesteps):
        expected = network(x, features, timestep.expand(2))
        for last in (x.shape[1], 2):
            torch.testing.assert_close(network.step(x, prepared.at(i), last), expected[:, -last:])
    first, third = (network.step(x, prepared.at(i), x.shape[1]) for i in (0, 2))
    assert not torch.allclose(first, third, atol=1e-3)


@pytest.mark.parametrize("stack", ["dit", "self_attention"])
def test_masked_features_do_not_count(stack):
    x, features, timesteps = inputs()
    mask = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])[:, None, None]
    if stack == "dit":
        network = dit(interleave_self_attention=True)
        alone = network(x[1:], features[1:, 3:], timesteps[1:])
        torch.testing.assert_close(network(x, features, timesteps, mask)[1:], alone)
        assert not torch.allclose(network(x, features, timesteps)[1:], alone, atol=1e-4)
    else:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 5, "num_layers": 2, "positional_embeddings": None}
        network = SelfAttentionTransformer(SelfAttentionTransformerConfig(**sizes)).eval()
        alone = network(features[1:, 3:])
        torch.testing.assert_close(network(features, mask)[1:, 3:], alone)
        assert not torch.allclose(network(features)[1:, 3:], alone, atol=1e-4)


def test_self_attention_transformer():
    """Norms have weights, and nothing follows the last block."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 5, "num_layers": 1, "positional_embeddings": None}
    network = SelfAttentionTransformer(SelfAttentionTransformerConfig(**sizes)).eval()
    (block,) = network.transformer_blocks
    x = torch.randn(2, 7, 10)
    y = x + block.attn1(F.layer_norm(x, (10,), block.norm1.weight, block.norm1.bias))
    y = y + block.ff(F.layer_norm(y, (10,), block.norm3.weight, block.norm3.bias))
    torch.testing.assert_close(network(x), y)
