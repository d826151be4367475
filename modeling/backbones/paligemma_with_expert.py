"""PaliGemmaWithExpertModel: PaliGemma and a smaller action expert, whose tokens attend to each other in every layer.

Shapes: b batch, n tokens of the prefix (pictures, words), m tokens of the suffix (state, actions), d PaliGemma's
width, w the expert's, k heads of keys and values, e width of a head. Source: Black et al. 2024 (arXiv 2410.24164) and
openpi; the layers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GemmaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm, apply_rotary_pos_emb
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from ...configuration.pi0 import ATTENTION, PaliGemmaWithExpertConfig
from ...errors import FeatureShapeError, InvalidConfigError

# Keys and values of one layer, (b, k, n, e) each.
KeysValues = tuple[torch.Tensor, torch.Tensor]


class PaliGemmaWithExpertModel(nn.Module):
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
        self.layers = nn.ModuleList(JointLayer(text, expert, i) for i in range(text.num_hidden_layers))
        self.language_norm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.expert_norm = GemmaRMSNorm(expert.hidden_size, eps=expert.rms_norm_eps)
        self.freeze()
        self.train()

    def _frozen_modules(self) -> list[nn.Module]:
        """Return what the config says is not trained."""
        if self.config.train_expert_only:
            own = [self.vision_tower, self.multi_modal_projector, self.embed_tokens, self.language_norm]
            return own + [layer.language_model for layer in self.layers]
        return [self.vision_tower] if self.config.freeze_vision_encoder else []

    def freeze(self) -> None:
        """Mark what the config says is not trained."""
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def prefix_tail(self) -> list[nn.Module]:
        """Return what only the prefix's own output depends on: in the last layer all but its keys and values."""
        last = self.layers[-1].language_model
        attention = last.self_attn
        return [attention.q_proj, attention.o_proj, last.post_attention_layernorm, last.mlp, self.language_norm]

    def train(self, mode: bool = True) -> PaliGemmaWithExpertModel:
        """Set training mode, except in what the config freezes and nobody has unfrozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.train(mode and any(parameter.requires_grad for parameter in module.parameters()))
        return self

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the tokens (b, n, d) of pictures (b, 3, h, w) in [-1, 1]; they are not scaled as words are."""
        image = image.to(self.vision_tower.dtype)
        return self.multi_modal_projector(self.vision_tower(image).last_hidden_state)

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

        Returns:
            [prefix (b, n, d), suffix (b, m, w)], None where not given or not wanted, and the cache, None without one.

        Raises:
            FeatureShapeError: the mask does not span the tokens.
        """
        given = [x for x in inputs_embeds if x is not None]
        dtype = self.embed_tokens.weight.dtype
        hidden = [None if x is None else x.to(dtype) for x in inputs_embeds]
        past = past_key_values if use_cache and not fill_kv_cache else None
        queries = sum(x.shape[1] for x in given)
        keys = queries + (past[0][0].shape[2] if past else 0)
        if tuple(attention_mask.shape) != (given[0].shape[0], queries, keys):
            expected = f"({given[0].shape[0]}, {queries}, {keys}): batch, queries, keys"
            raise FeatureShapeError("attention_mask", tuple(attention_mask.shape), expected)
        rotary = rotary_angles(position_ids, self.config.paligemma_config.text_config, dtype)
        filled = []
        for i, layer in enumerate(self.layers):
            finish_prefix = prefix_output or i + 1 < len(self.layers)
            prefix, suffix, keys_values = layer(
                *hidden,
                attention_mask,
                rotary,
                past[i] if past else None,
                finish_prefix,
                ATTENTION[self.config.attention_implementation],
            )
            hidden = [prefix, suffix]
            if use_cache and fill_kv_cache:
                filled.append(keys_values)
        norms = (self.language_norm, self.expert_norm)
        outputs = [None if x is None else norm(x) for norm, x in zip(norms, hidden, strict=True)]
        cache = (filled if fill_kv_cache else past_key_values) if use_cache else None
        return outputs, cache


class JointLayer(GradientCheckpointingLayer):
    """Hold one layer of both streams, whose tokens meet in one attention; all else each stream does alone.

    It is one module so that gradient checkpointing recomputes it whole and FSDP gathers both streams' weights at once.
    """

    def __init__(self, text: GemmaConfig, expert: GemmaConfig, index: int):
        super().__init__()
        self.language_model = GemmaDecoderLayer(text, index)
        self.gemma_expert = GemmaDecoderLayer(expert, index)

    def forward(
        self,
        prefix: torch.Tensor | None,
        suffix: torch.Tensor | None,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: KeysValues | None,
        finish_prefix: bool,
        implementation: str,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, KeysValues]:
        """Return both streams, None where absent or not finished, and the keys and values of the tokens given."""
        # 1. Queries, keys and values of each stream, by its own projections.
        streams = [(self.language_model, prefix), (self.gemma_expert, suffix)]
        streams = [(layer, x) for layer, x in streams if x is not None]
        finished = [finish_prefix or layer is self.gemma_expert for layer, _ in streams]
        q, k, v = [], [], []
        for (layer, x), finish in zip(streams, finished, strict=True):
            x, attention = layer.input_layernorm(x), layer.self_attn  # (b, n, d)
            if finish:
                q.append(_heads(attention.q_proj(x), attention.head_dim))
            k.append(_heads(attention.k_proj(x), attention.head_dim))
            v.append(_heads(attention.v_proj(x), attention.head_dim))
        cos, sin = rotary
        k, v = torch.cat(k, dim=2), torch.cat(v, dim=2)  # (b, k, n + m, e)
        _, k = apply_rotary_pos_emb(k, k, cos, sin)
        keys_values = (k, v)
        if not q:
            return None, None, keys_values
        # 2. One attention over all of them.
        q = torch.cat(q, dim=2)  # (b, heads, queries, e)
        last = q.shape[2]
        q, _ = apply_rotary_pos_emb(q, q, cos[:, -last:], sin[:, -last:])
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = attend(self.language_model.self_attn, implementation, q, k, v, mask[:, -last:])  # (b, queries, ·)
        # 3. What was attended to, and the feed-forward, of each stream.
        outputs: dict[nn.Module, torch.Tensor] = {}
        start = 0
        for (layer, x), finish in zip(streams, finished, strict=True):
            if finish:
                x = x + layer.self_attn.o_proj(attended[:, start : start + x.shape[1]])
                start += x.shape[1]
                outputs[layer] = x + layer.mlp(layer.post_attention_layernorm(x))
        return outputs.get(self.language_model), outputs.get(self.gemma_expert), keys_values


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)  # (b, n, heads · e) → (b, heads, n, e)


def rotary_angles(positions: torch.Tensor, config: GemmaConfig, dtype: torch.dtype) -> KeysValues:
    """Return cosine and sine (b, n, e) of the rotary positions (b, n), computed in float32 whatever the weights are.

    No buffer holds the frequencies: casting a model would round them.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)  # (e / 2,)
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (even / config.head_dim)
    angles = positions[..., None].to(torch.float32) * frequencies  # (b, n, e / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attend(
    attention: nn.Module, implementation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return softmax(q kᵀ / √e) v as (b, queries, heads · e), for queries (b, heads, queries, e).

    Args:
        attention: Gemma's, which knows its scale and how many query heads share one of keys and values.
        implementation: transformers' name of the kernel.
        k, v: (b, k, keys, e).
        mask: (b, queries, keys) bool, True where a query sees a key.
    """
    mask = mask[:, None]  # (b, 1, queries, keys)
    if implementation == "eager":
        groups = attention.num_key_value_groups
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * attention.scaling
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)
    else:
        if implementation == "flex_attention":  # which adds a mask to the scores
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        out, _ = kernel(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling, is_causal=False)
    return out.flatten(2)  # (b, queries, heads, e) → (b, queries, heads · e)
