"""The attention sublayer: grouped-query attention with slots on q, k, v and before the output."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_llmnorm import LlmNormConfig
from .operations import compute_dtype
from .positions import POSITIONS
from .residual import NormSpec, ResidualSpec, build_slot
from .rotary import Table
from .weights import linear


def eager_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; the softmax is taken in float32 or higher.

    Shape: query is (batch, heads, seq, head_dim), key and value are (batch, kv_heads, keys,
    head_dim), attention_mask is additive, broadcastable to (batch, heads, seq, keys).

    Returns:
        The context (batch, seq, heads, head_dim) and the weights (batch, heads, seq, keys).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=compute_dtype(scores)).to(query.dtype)
    weights = drop(weights, p=dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionCore(nn.Module):
    """Weigh the values; a module of its own so that transformers can record the weights.

    It has what attention functions read of a module, and what a server that brings its own finds
    the layer by: `config`, `layer_idx`, `scaling`.
    """

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        return attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout * self.training,
            **kwargs,
        )


class Attention(nn.Module):
    """Grouped-query attention; slots q, k, v act before RoPE, q_rotated and k_rotated after it.

        Q = q_rotated(rope(q(W_q x))), K = k_rotated(rope(k(W_k x))), V = v(W_v x)
        y = o_proj( inner( softmax(Q K^T / sqrt(head_dim)) V ) )

    Shape: hidden_states and the result are (batch, seq, hidden); q, k and v see (batch, seq,
    features) or (batch, seq, heads, head_dim), q_rotated and k_rotated (batch, heads, seq,
    head_dim).

    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245; slots on q and k: Henry et al. 2020
    (arXiv:2010.04245), per head as in Qwen 3, full width as in OLMo 2.
    """

    def __init__(self, config: LlmNormConfig, spec: ResidualSpec, layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, bias = config.hidden_size, config.attention_bias
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.position = POSITIONS[config.position].attend
        self.q_proj = linear(config, hidden, heads * self.head_dim, bias=bias)
        self.k_proj = linear(config, hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = linear(config, hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = linear(config, heads * self.head_dim, hidden, bias=bias)
        self.q_norm, self.q_view = self._feature_slot(spec.q, heads)
        self.k_norm, self.k_view = self._feature_slot(spec.k, kv_heads)
        self.v_norm, self.v_view = self._feature_slot(spec.v, kv_heads)
        self.q_rotated = build_slot(spec.q_rotated, self.head_dim)
        self.k_rotated = build_slot(spec.k_rotated, self.head_dim)
        self.core = AttentionCore(config, layer_idx)
        self.inner = build_slot(spec.inner, heads * self.head_dim)

    def _feature_slot(self, spec: NormSpec | None, heads: int) -> tuple[nn.Module, tuple[int, ...]]:
        """The slot's module and the trailing shape it works on: each head, or all features."""
        if spec is not None and spec.per_head:
            return build_slot(spec, self.head_dim), (-1, self.head_dim)
        return build_slot(spec, heads * self.head_dim), (-1,)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        rotary: Table,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(*shape, *self.q_view))
        key = self.k_norm(self.k_proj(hidden_states).view(*shape, *self.k_view))
        value = self.v_norm(self.v_proj(hidden_states).view(*shape, *self.v_view))
        query, key, value = (part.view(heads).transpose(1, 2) for part in (query, key, value))
        query, key = self.position(query, key, rotary)
        query, key = self.q_rotated(query), self.k_rotated(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        context, _ = self.core(query, key, value, attention_mask, **kwargs)
        return self.o_proj(self.inner(context.reshape(*shape, -1)))
