"""What a denoising step of GR00T's heads costs, against the same arithmetic written straight down.

Counted are calls of ATen operators that compute. An operator is a view, and not counted, where its schema says that
its output shares memory with its input (`OpOverload.is_view`: view, transpose, slice, expand, …), and so is
`_unsafe_view`, which differs from `view` for autograd only.
"""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from torch.utils._python_dispatch import TorchDispatchMode

from manipulators import (
    FlowmatchingActionHead,
    FlowmatchingActionHead_1_5,
    FlowmatchingActionHeadConfig,
    FlowmatchingActionHeadConfig_1_5,
)
from manipulators.modeling.seam import Draws, Features, PolicyInputs

WIDTH, HEADS, LAYERS, HORIZON, FUTURE, TOKENS = 16, 2, 16, 5, 3, 11
STEPS = 4
MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Operators(TorchDispatchMode):
    """Count the operators that compute, and matrix products over as many rows as there are features."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.over_features = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if not operator.is_view and name != "_unsafe_view":
            self.calls[name] += 1
        if name in MATRIX_PRODUCTS:
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.over_features += left.shape[-2] == TOKENS
        return operator(*args, **(kwargs or {}))


def counted(function, *arguments):
    """Return the operators that a call makes."""
    with torch.no_grad(), Operators() as operators:
        function(*arguments)
    return operators


# --- the reference's arithmetic, written straight down ----------------------------------------------------


class Plain:
    """Compute the velocity as NVIDIA's head does: what no step changes is computed again in every step.

    Only what works on the features first (N1.5) is done once per chunk there, too, as is the state's token.
    """

    def __init__(self, head, features, state, ids):
        self.weights, self.ids, self.features = head.state_dict(), ids, features
        if "vlln.weight" in self.weights:
            self.features = self.norm("vlln", features)
            count = len(head.vl_self_attention.transformer_blocks)
            for block in (f"vl_self_attention.transformer_blocks.{i}" for i in range(count)):
                y = self.norm(f"{block}.norm1", self.features)
                x = self.features + self.attention(f"{block}.attn1", y, y)
                self.features = x + self.feed_forward(f"{block}.ff", self.norm(f"{block}.norm3", x))
        x = F.relu(self.specific("state_encoder.layer1", state[:, None]))
        self.state = self.specific("state_encoder.layer2", x)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def specific(self, name, x):
        return torch.bmm(x, self.weights[f"{name}.W"][self.ids]) + self.weights[f"{name}.b"][self.ids].unsqueeze(1)

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attention(self, name, x, context):
        def split(x):
            return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        q, k, v = (
            self.linear(f"{name}.to_q", x),
            self.linear(f"{name}.to_k", context),
            self.linear(f"{name}.to_v", context),
        )
        x = F.scaled_dot_product_attention(split(q), split(k), split(v))
        return self.linear(f"{name}.to_out.0", x.transpose(1, 2).flatten(2))

    def feed_forward(self, name, x):
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def step(self, actions, bucket):
        b, h = actions.shape[:2]
        # 1. The tokens: state, future, actions.
        frequencies = torch.exp(torch.arange(WIDTH // 2) * (-math.log(10000) / (WIDTH // 2)))
        angles = torch.full((b, h, 1), float(bucket)) * frequencies
        code = torch.cat([angles.sin(), angles.cos()], dim=-1)
        x = self.specific("action_encoder.W2", torch.cat([self.specific("action_encoder.W1", actions), code], dim=-1))
        x = self.specific("action_encoder.W3", x * torch.sigmoid(x))
        x = x + F.embedding(torch.arange(h), self.weights["position_embedding.weight"])
        future = [self.weights["future_tokens.weight"].expand(b, -1, -1)] if "vlln.weight" in self.weights else []
        x = torch.cat([self.state, *future, x], dim=1)
        # 2. The timestep.
        angles = torch.full((b, 1), float(bucket)) * torch.exp(torch.arange(128) * (-math.log(10000) / 127))
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)
        time = F.silu(self.linear("model.timestep_encoder.timestep_embedder.linear_1", time))
        time = self.linear("model.timestep_encoder.timestep_embedder.linear_2", time)
        # 3. The blocks.
        for i in range(LAYERS):
            block = f"model.transformer_blocks.{i}"
            scale, shift = self.linear(f"{block}.norm1.linear", F.silu(time)).chunk(2, dim=1)
            y = F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
            x = x + self.attention(f"{block}.attn1", y, y if i % 2 else self.features)
            x = x + self.feed_forward(f"{block}.ff", F.layer_norm(x, (WIDTH,)))
        shift, scale = self.linear("model.proj_out_1", F.silu(time)).chunk(2, dim=1)
        x = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = self.linear("model.proj_out_2", x)
        # 4. The velocity.
        x = self.specific("action_decoder.layer2", F.relu(self.specific("action_decoder.layer1", x)))
        return x[:, -h:]

    def sample(self, noise, steps):
        for i in range(steps):
            noise = noise + self.step(noise, int(i / steps * 1000)) / steps
        return noise


# --- tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["n1", "n1_5"])
def head(request):
    """A head of 16 tiny blocks, as many as published, no weight of which is zero."""
    torch.manual_seed(0)
    transformer = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "positional_embeddings": None}
    common = {
        "diffusion_model_cfg": transformer | {"num_layers": LAYERS, "interleave_self_attention": True},
        "input_embedding_dim": WIDTH,
        "hidden_size": 12,
        "action_dim": 4,
        "action_horizon": HORIZON,
        "max_state_dim": 6,
        "max_num_embodiments": 3,
        "num_inference_timesteps": STEPS,
    }
    if request.param == "n1":
        head = FlowmatchingActionHead(FlowmatchingActionHeadConfig(**common))
    else:
        config = FlowmatchingActionHeadConfig_1_5(
            backbone_embedding_dim=WIDTH,
            vl_self_attention_cfg=transformer | {"num_layers": 2},
            num_target_vision_tokens=FUTURE,
            **common,
        )
        head = FlowmatchingActionHead_1_5(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


@pytest.fixture
def chunk():
    """Return a function: slots of embodiments → features, state, slots and noise for a batch of them."""

    def draw(*slots):
        torch.manual_seed(1)
        b = len(slots)
        features, state, noise = torch.randn(b, TOKENS, WIDTH), torch.randn(b, 6), torch.randn(b, HORIZON, 4)
        return SimpleNamespace(features=features, state=state, ids=torch.tensor(slots), noise=noise)

    return draw


def prepared(head, given, steps=STEPS):
    timesteps = torch.tensor([int(time * 1000) for time in head.sampler.times(steps)])
    with torch.no_grad():
        return head.prepare(given.features, None, given.state[:, None], given.ids, timesteps)


def sampled(head, given, steps=STEPS):
    inputs = PolicyInputs(state=given.state, embodiment_id=given.ids)
    return head.sample(Features(given.features), inputs, Draws(given.noise, num_steps=steps))


@pytest.mark.parametrize("slots", [(1,), (2, 2), (2, 0, 1)], ids=["one", "shared", "mixed"])
def test_the_plain_formulation_gives_the_same_actions(head, chunk, slots):
    given = chunk(*slots)
    found = sampled(head, given)
    expected = Plain(head, given.features, given.state, given.ids).sample(given.noise, STEPS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_operators_per_step(head, chunk):
    given = chunk(1)
    ours = counted(head.step, given.noise, prepared(head, given).at(1)).calls
    plain = counted(Plain(head, given.features, given.state, given.ids).step, given.noise, 250).calls
    assert ours.total() <= 186
    assert plain.total() >= 320  # LeRobot 0.5.1, with Euler's step: 351


def test_several_embodiments_cost_no_operator_more(head, chunk):
    """Their weights are gathered once per chunk."""
    shared, mixed = chunk(1, 1), chunk(1, 2)
    of_shared = counted(head.step, shared.noise, prepared(head, shared).at(1)).calls
    of_mixed = counted(head.step, mixed.noise, prepared(head, mixed).at(1)).calls
    assert of_mixed.total() <= of_shared.total()
    assert of_mixed["index"] == 0


def test_features_are_read_once_per_chunk(head, chunk):
    given = chunk(1)

    def products(steps):
        return counted(sampled, head, given, steps).over_features

    # Keys and values of the 8 blocks that see them; N1.5: query, key, value, output and two of the feed-forward twice.
    expected = 8 * 2 + (2 * 6 if isinstance(head, FlowmatchingActionHead_1_5) else 0)
    assert products(1) == products(STEPS) == products(3 * STEPS) == expected
    assert counted(head.step, given.noise, prepared(head, given).at(1)).over_features == 0
    plain = Plain(head, given.features, given.state, given.ids)
    assert counted(plain.sample, given.noise, STEPS).over_features == STEPS * 8 * 2
