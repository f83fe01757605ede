"""A decoder written out by hand, for tests that say where a placement puts its norms.

Only weights are taken from the model; projections, RoPE, attention and norms are computed here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from torch.nn.functional import linear, silu

from llmnorm import LlmNormForCausalLM, build_config, build_model

Function = Callable[[torch.Tensor], torch.Tensor]
EPS = 1e-6


def model_of(
    placement: str | Mapping[str, Any], *, depth: int = 4, norm: Any = "rmsnorm", **overrides: Any
) -> LlmNormForCausalLM:
    """A float64 model whose norms and gains are moved off 1, so that none can be swapped unseen.

    Matrices are made larger too: with std 0.02 a branch would hardly show in the stream.
    """
    config = build_config(
        SHAPE, norm=norm, placement=placement, num_hidden_layers=depth, **overrides
    )
    model = build_model(config, seed=3).double().eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    return model


def same(x: torch.Tensor) -> torch.Tensor:
    """Nothing in the slot."""
    return x


def rms(module: nn.Module) -> Function:
    """x / sqrt(mean(x^2) + eps) * weight, with the weight of `module`."""
    return lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * module.weight


def rope(x: torch.Tensor) -> torch.Tensor:
    """Turn feature pairs (i, i + half) by position * 10000^(-i / half); x is (batch, seq, ...)."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[1], dtype=torch.float64)
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(
    layer: nn.Module,
    inner: Function = same,
    *,
    q: Function = same,
    k: Function = same,
    v: Function = same,
) -> Function:
    """Causal grouped-query attention of SHAPE, `inner` before the output projection.

    `q`, `k` and `v` act on (batch, seq, heads, head_dim), before RoPE.
    """
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    head_dim = SHAPE["hidden_size"] // heads

    def attend(x: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x.shape
        part = layer.self_attn
        query = rope(q(linear(x, part.q_proj.weight).view(batch, seq, heads, head_dim)))
        key = rope(k(linear(x, part.k_proj.weight).view(batch, seq, groups, head_dim)))
        value = v(linear(x, part.v_proj.weight).view(batch, seq, groups, head_dim))
        context = torch.empty_like(query)
        for head in range(heads):
            group = head * groups // heads
            scores = query[:, :, head] @ key[:, :, group].mT / head_dim**0.5
            future = torch.ones(seq, seq).triu(1).bool()
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            context[:, :, head] = weights @ value[:, :, group]
        return linear(inner(context.flatten(2)), part.o_proj.weight)

    return attend


def mlp(layer: nn.Module, inner: Function = same) -> Function:
    """SwiGLU, `inner` before the output projection."""
    part = layer.mlp
    return lambda x: linear(
        inner(silu(linear(x, part.gate_proj.weight)) * linear(x, part.up_proj.weight)),
        part.down_proj.weight,
    )


Block = Callable[[int, nn.Module, torch.Tensor], torch.Tensor]


@torch.no_grad()
def assert_follows(model: LlmNormForCausalLM, block: Block, *, final: bool = True) -> None:
    """Each layer's output equals `block(number, layer, x)`, number 1-based; the trunk's end too."""
    ids = tokens()
    outputs = model.model(ids, output_hidden_states=True)
    x = model.model.embedding_norm(model.model.embedding_scale(model.model.embed_tokens(ids)))
    for number, layer in enumerate(model.model.layers, start=1):
        torch.testing.assert_close(outputs.hidden_states[number - 1], x, **TOLERANCE[torch.float64])
        x = block(number, layer, x)
    x = rms(model.model.norm)(x) if final else x
    torch.testing.assert_close(outputs.last_hidden_state, x, **TOLERANCE[torch.float64])


Close = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
TwoStreamBlock = Callable[
    [int, nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


@torch.no_grad()
def assert_two_streams_follow(
    model: LlmNormForCausalLM, block: TwoStreamBlock, close: Close, *, scale: float = 1.0
) -> None:
    """Each layer's (p, r) equals `block(number, layer, p, r)`, and the trunk's end `close(p, r)`.

    p starts as the embedding, r as `scale` times that; what users see after a layer is closed too.
    """
    ids, states = tokens(), []
    hooks = [
        layer.register_forward_hook(lambda module, given, state: states.append(state))
        for layer in model.model.layers
    ]
    outputs = model.model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    p = model.model.embed_tokens(ids)
    r = scale * p
    for number, layer in enumerate(model.model.layers, start=1):
        found = outputs.hidden_states[number - 1]
        torch.testing.assert_close(found, close(model, p, r), **TOLERANCE[torch.float64])
        p, r = block(number, layer, p, r)
        wanted = torch.stack((p, r))
        torch.testing.assert_close(states[number - 1], wanted, **TOLERANCE[torch.float64])
    end = model.model.norm(close(model, p, r))
    torch.testing.assert_close(outputs.last_hidden_state, end, **TOLERANCE[torch.float64])


def norm_names(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to no matrix, without `model.`."""
    matrices = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
    names = {name.removeprefix("model.") for name, _ in model.named_parameters()}
    return {name for name in names if not name.endswith(matrices)}


def names_in_layers(depth: int, *slots: str, final: bool = True) -> set[str]:
    """`layers.{i}.{slot}.weight` for every layer and slot, and `norm.weight`."""
    names = {f"layers.{i}.{slot}.weight" for i in range(depth) for slot in slots}
    return names | ({"norm.weight"} if final else set())


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` every parameter of `source`; the names must be the same."""
    target.load_state_dict(source.state_dict())
