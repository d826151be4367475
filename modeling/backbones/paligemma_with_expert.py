"""PaliGemmaWithExpertModel: PaliGemma and a smaller action expert, whose tokens attend to each other in every layer.

Shapes: b batch, n tokens of the prefix (pictures, words), m tokens of the suffix (state, actions), d PaliGemma's
width, w the expert's, k heads of keys and values, e width of a head. Source: Black et al. 2024 (arXiv
2410.24164) and openpi; the layers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import AutoModel, GemmaConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from ...configuration.pi0 import ATTENTION, PaliGemmaWithExpertConfig
from ...errors import FeatureShapeError, InvalidConfigError
from ..freezing import PartlyFrozen
from ..kernels import require_kernel
from ..layers.adaptive_norm import AdaptiveRMSNorm, ExpertModulation
from ..layers.fused import ResidualLinear, ScaledRMSNorm, add_linear, join, project_joined
from ..precision import compute_dtype

# Keys and values of one layer, (b, k, n, e) each; cosine and sine of rotary positions, (b, n, 1, e) each.
KeysValues = tuple[torch.Tensor, torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class PaliGemmaWithExpertModel(PartlyFrozen):
    """Run PaliGemma's tokens and the expert's through their own layers, with one attention over both.

    Language model heads do not exist: nothing here predicts words.

    Args:
        config (`PaliGemmaWithExpertConfig`): or its fields as keywords.

    Raises:
        InvalidConfigError: the two parts cannot attend to each other.
    """

    def __init__(self, config: PaliGemmaWithExpertConfig | None = None, **fields: Any):
        super().__init__()
        if config is not None and fields:
            raise InvalidConfigError(f"Pass a config or its fields, not both; given a config and {', '.join(fields)}.")
        self.config = config = config or PaliGemmaWithExpertConfig(**fields)
        paligemma, expert = config.paligemma_config, config.gemma_expert_config
        text = paligemma.text_config
        self.vision_tower = AutoModel.from_config(
            paligemma.vision_config, attn_implementation=ATTENTION[config.attention_implementation]
        )
        self.multi_modal_projector = PaliGemmaMultiModalProjector(paligemma)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(JointLayer(config, i) for i in range(text.num_hidden_layers))
        self.language_norm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.expert_norm = expert_norm(config)
        self.expert_modulation = None
        if config.adaptive_norms:
            self.expert_modulation = ExpertModulation(expert.hidden_size, expert.num_hidden_layers)
        # As transformers' Gemma starts; torch's defaults everywhere else.
        for module in (self.embed_tokens, *self.layers.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.start_weights = start_normal
        for module in self.modules():
            if isinstance(module, GemmaRMSNorm):
                module.start_weights = start_zero
        self.freeze()
        self.train()

    def frozen_modules(self) -> list[nn.Module]:
        """Return what the config says is not trained."""
        if self.config.train_expert_only:
            own = [self.vision_tower, self.multi_modal_projector, self.embed_tokens, self.language_norm]
            return own + [layer.language_model for layer in self.layers]
        return [self.vision_tower] if self.config.freeze_vision_encoder else []

    def prefix_tail(self) -> list[nn.Module]:
        """Return what only the prefix's own output depends on: in the last layer all but its keys and values."""
        last = self.layers[-1].language_model
        attention = last.self_attn
        return [attention.q_proj, attention.o_proj, last.post_attention_layernorm, last.mlp, self.language_norm]

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the tokens (b, n, d) of pictures (b, 3, h, w) in [-1, 1]; they are not scaled as words are."""
        require_kernel(self.vision_tower.config._attn_implementation, image.device)
        image = image.to(compute_dtype(self.vision_tower))
        return self.multi_modal_projector(self.vision_tower(image)[0])  # whatever its config's return_dict

    def embed_language_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (b, n, d) of token ids (b, n), times √d as Gemma expects."""
        words = self.embed_tokens(tokens)
        return words * torch.tensor(words.shape[-1] ** 0.5, dtype=words.dtype)  # rounded as the words are

    def forward(
        self,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Sequence[KeysValues] | None = None,
        inputs_embeds: Sequence[torch.Tensor | None] = (None, None),
        use_cache: bool = False,
        fill_kv_cache: bool = False,
        prefix_output: bool = True,
        modulation: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor | None], Sequence[KeysValues] | None]:
        """Pass prefix and suffix through all layers; either may be None.

        Args:
            attention_mask: (b, tokens given, tokens cached and given) bool, True where a token sees another.
            position_ids: (b, tokens given).
            past_key_values: the cache of an earlier call, read where `use_cache` is set. It is never changed.
            inputs_embeds: [prefix (b, n, d), suffix (b, m, w)].
            use_cache: read or fill the cache.
            fill_kv_cache: return the keys and values of the tokens given, rather than the cache that was given.
            prefix_output: compute the prefix's output. Where only the suffix's is wanted, the last layer's work for
                the prefix ends with its keys and values.
            modulation: of adaptive norms, see `run_layers`.

        Returns:
            [prefix (b, n, d), suffix (b, m, w)], None where not given or not wanted, and the cache, None without one.

        Raises:
            FeatureShapeError: the mask does not span the tokens.
        """
        given = [x for x in inputs_embeds if x is not None]
        past = past_key_values if use_cache and not fill_kv_cache else None
        queries = sum(x.shape[1] for x in given)
        start = past[0][0].shape[2] if past else 0
        if tuple(attention_mask.shape) != (given[0].shape[0], queries, start + queries):
            expected = f"({given[0].shape[0]}, {queries}, {start + queries}): batch, queries, keys"
            raise FeatureShapeError("attention_mask", tuple(attention_mask.shape), expected)
        if past:
            past = [(F.pad(k, (0, 0, 0, queries)), F.pad(v, (0, 0, 0, queries))) for k, v in past]
        rotary, bias = self.rotary(position_ids), self.attention_bias(attention_mask)
        outputs, filled = self.run_layers(inputs_embeds, bias, rotary, past, start, (prefix_output, True), modulation)
        cache = (filled if fill_kv_cache else past_key_values) if use_cache else None
        return outputs, cache

    def run_layers(
        self,
        streams: Sequence[torch.Tensor | None],
        bias: torch.Tensor,
        rotary: Rotary,
        cache: Sequence[KeysValues] | None = None,
        start: int = 0,
        wanted: tuple[bool, bool] = (True, True),
        modulation: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor | None], list[KeysValues]]:
        """Pass [prefix, suffix] through all layers; what serves many passes is given, so that it is computed once.

        Args:
            streams: [prefix (b, n, d), suffix (b, m, w)].
            bias: (b, 1, queries or 1, keys), see `attention_bias`.
            rotary: of the tokens given, see `rotary`.
            cache: of every layer, buffers (b, k, at least keys, e) that hold earlier tokens and receive those given.
            start: how many stand before those given.
            wanted: which outputs to compute; of others the last layer computes no more than keys and values.
            modulation: of the expert's norms where they are adaptive, (b, 1, (6 layers + 3) · w) or without b and 1
                where all share it, see `ExpertModulation`.

        Returns:
            [prefix, suffix], None where not given or not wanted, and all layers' keys and values.
        """
        dtype = compute_dtype(self.embed_tokens)
        streams = [None if x is None else x.to(dtype) for x in streams]
        implementation = ATTENTION[self.config.attention_implementation]
        *modulations, last_modulation = split_modulation(modulation, len(self.layers))
        filled = []
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            kept = None if cache is None else cache[i]
            *streams, keys_values = layer(
                *(*streams, bias, rotary, implementation, kept, start, wanted if last else (True, True)),
                modulations[i],
            )
            filled.append(keys_values)
        prefix, suffix = streams
        prefix = None if prefix is None else self.language_norm(prefix)
        return [prefix, None if suffix is None else normalised(self.expert_norm, suffix, last_modulation)[0]], filled

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Return the tables of rotary positions (b, n), see `rotary_angles`."""
        return rotary_angles(positions, self.config.paligemma_config.text_config, compute_dtype(self.embed_tokens))

    def attention_bias(self, mask: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores, (b, 1, queries, keys), for a mask (b, queries, keys) of who sees whom."""
        dtype = compute_dtype(self.embed_tokens)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None]

    def new_cache(self, like: torch.Tensor, tokens: int) -> list[KeysValues]:
        """Return empty buffers (b, k, n, e) for the keys and values of so many tokens in every layer.

        They lie where the layer computes: where accelerate says, else where `like` (b, …) lies. Each has memory of its
        own: compiled, writing into a part of one that all share would copy the whole.
        """
        text, dtype = self.config.paligemma_config.text_config, compute_dtype(self.embed_tokens)
        shape = (len(like), text.num_key_value_heads, tokens, text.head_dim)
        hooks = [getattr(layer, "_hf_hook", None) for layer in self.layers]
        devices = [getattr(hook, "execution_device", None) or like.device for hook in hooks]
        return [tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)) for device in devices]

    def fuse(self) -> None:
        """Join projections that read the same, and let others add to the residual stream themselves."""
        for joint in self.layers:
            for layer in (joint.language_model, joint.gemma_expert):
                join(layer.self_attn, "qkv_proj", QKV)
                join(layer.mlp, "gate_up_proj", GATE_UP)
                if isinstance(layer.input_layernorm, AdaptiveRMSNorm):
                    continue  # what a layer adds passes a gate
                layer.self_attn.o_proj = ResidualLinear(layer.self_attn.o_proj)
                layer.mlp.down_proj = ResidualLinear(layer.mlp.down_proj)
                layer.input_layernorm = ScaledRMSNorm(layer.input_layernorm)
                layer.post_attention_layernorm = ScaledRMSNorm(layer.post_attention_layernorm)
        if self.expert_modulation is None:
            self.expert_norm = ScaledRMSNorm(self.expert_norm)


class JointLayer(GradientCheckpointingLayer):
    """Hold one layer of both streams, whose tokens meet in one attention; all else each stream does alone.

    It is one module so that gradient checkpointing recomputes it whole and FSDP gathers both streams' weights at once.
    """

    def __init__(self, config: PaliGemmaWithExpertConfig, index: int):
        super().__init__()
        self.language_model = GemmaDecoderLayer(config.paligemma_config.text_config, index)
        self.gemma_expert = GemmaDecoderLayer(config.gemma_expert_config, index)
        if config.adaptive_norms:
            self.gemma_expert.input_layernorm = expert_norm(config)
            self.gemma_expert.post_attention_layernorm = expert_norm(config)

    def forward(
        self,
        prefix: torch.Tensor | None,
        suffix: torch.Tensor | None,
        bias: torch.Tensor,
        rotary: Rotary,
        implementation: str,
        cache: KeysValues | None,
        start: int,
        wanted: tuple[bool, bool],
        modulation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, KeysValues]:
        """Return both streams, None where absent or not wanted, and the keys and values of all tokens so far.

        `modulation` (…, 6 w) is that of the expert's two norms, see `ExpertModulation`; None where they have weights.
        """
        layers = (self.language_model, self.gemma_expert)
        given = [(*one, i) for i, one in enumerate(zip(layers, (prefix, suffix), strict=True)) if one[1] is not None]
        before, after = (None, None) if modulation is None else modulation.chunk(2, dim=-1)
        inputs = [normalised(layer.input_layernorm, x, before if i else None) for layer, x, i in given]
        # 1. Queries, keys and values of each stream, by its own projections; queries and keys turned by position.
        heads = [
            project_joined(layer.self_attn, "qkv_proj", QKV, x)
            for (layer, *_), (x, _) in zip(given, inputs, strict=True)
        ]
        heads = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)  # (b, n + m, (heads + 2 k) · e)
        attention = self.language_model.self_attn
        heads = heads.unflatten(-1, (-1, attention.head_dim))  # (b, n + m, heads + 2 k, e)
        k = attention.config.num_key_value_heads
        turned = rotate(heads[:, :, :-k], rotary).transpose(1, 2)  # (b, heads + k, n + m, e)
        queries, keys, values = turned[:, :-k], turned[:, -k:], heads[:, :, -k:].transpose(1, 2)
        if cache is not None:
            end = start + keys.shape[2]
            cache[0][:, :, start:end], cache[1][:, :, start:end] = keys, values
            keys, values = cache[0][:, :, :end], cache[1][:, :, :end]
        outputs: list[torch.Tensor | None] = [None, None]
        gates = [gate for _, gate in inputs]
        going_on = [(*one, gate) for one, gate in zip(given, gates, strict=True) if wanted[one[2]]]
        # 2. One attention over all of them, by the streams that go on: both, or the later one.
        if going_on:
            rows = sum(x.shape[1] for _, x, _, _ in going_on)
            bias = bias[:, :, -rows:]  # one row serves all
            attended = attend(attention, implementation, queries[:, :, -rows:], keys, values, bias)
        # 3. What was attended to, and the feed-forward, of each stream.
        start = 0
        for layer, x, i, gate in going_on:
            part, start = attended[:, start : start + x.shape[1]], start + x.shape[1]
            x = add_linear(x, layer.self_attn.o_proj, part, gate)
            hidden, gate = normalised(layer.post_attention_layernorm, x, after if i else None)
            outputs[i] = add_linear(x, layer.mlp.down_proj, gated(layer.mlp, hidden), gate)
        return *outputs, (keys, values)


def expert_norm(config: PaliGemmaWithExpertConfig) -> nn.Module:
    """Return a norm of the expert's, with weights or adaptive."""
    expert = config.gemma_expert_config
    if config.adaptive_norms:
        return AdaptiveRMSNorm(expert.hidden_size, expert.rms_norm_eps)
    return GemmaRMSNorm(expert.hidden_size, eps=expert.rms_norm_eps)


def split_modulation(modulation: torch.Tensor | None, layers: int) -> Sequence[torch.Tensor | None]:
    """Return the modulation of each layer (…, 6 w), and that of the last norm (…, 3 w); None for all without one."""
    if modulation is None:
        return [None] * (layers + 1)
    return modulation.split(modulation.shape[-1] // (2 * layers + 1) * 2, dim=-1)


def normalised(
    norm: nn.Module, x: torch.Tensor, modulation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a norm makes of x (b, n, d), and the gate of what the layer adds to x: None under Gemma's norm."""
    return (norm(x), None) if modulation is None else norm(x, modulation)


def start_normal(module: nn.Module) -> None:
    """Start weights as transformers' Gemma does."""
    init.normal_(module.weight, std=0.02)


def start_zero(module: GemmaRMSNorm) -> None:
    """Start a norm of Gemma's, which multiplies by 1 + weight."""
    init.zeros_(module.weight)


def gated(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the hidden layer (b, n, f) of Gemma's feed-forward."""
    gate, up = mlp.gate_up_proj(x).chunk(2, -1) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj(x), mlp.up_proj(x))
    return mlp.act_fn(gate) * up


def rotary_angles(positions: torch.Tensor, config: GemmaConfig, dtype: torch.dtype) -> Rotary:
    """Return cosine and signed sine (b, n, 1, e) of the rotary positions (b, n), for `rotate`.

    Computed in float32 whatever the weights are; no buffer holds the frequencies: casting a model would round them.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)  # (e / 2,)
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (even / config.head_dim)
    angles = positions[..., None, None].to(torch.float32) * frequencies  # (b, n, 1, e / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Return heads (b, n, heads, e), turned: the pair (x_i, x_{i + e/2}) by its angle."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attend(
    attention: nn.Module, implementation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return softmax(q kᵀ / √e + bias) v as (b, queries, heads · e), for queries (b, heads, queries, e).

    Args:
        attention: Gemma's, which knows its scale and how many query heads share one of keys and values.
        implementation: transformers' name of the kernel.
        k, v: (b, k, keys, e).
        bias: (b, 1, queries or 1, keys).
    """
    require_kernel(implementation, q.device)
    if implementation == "flex_attention":
        bias = bias.expand(-1, -1, q.shape[2], -1)
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        out, _ = kernel(attention, q, k, v, bias, dropout=0.0, scaling=attention.scaling, is_causal=False)
        return out.flatten(2)  # (b, queries, heads, e) → (b, queries, heads · e)
    # Every query head its keys and values, (b, heads, keys, e). No copy where all share one: kernels read the same
    # memory eight times.
    groups = attention.num_key_value_groups
    k, v = (x.expand(-1, groups, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
    if implementation == "eager":
        scores = torch.matmul(q, k.transpose(2, 3)) * attention.scaling + bias
        out = torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scaling)
    return out.transpose(1, 2).flatten(2)  # (b, heads, queries, e) → (b, queries, heads · e)
