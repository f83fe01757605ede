"""HybridNorm: norms on q, k and v, and y = N(x) + F(N(x)) for the mlp (Zhuo et al. 2025)."""

from typing import Any

import pytest
import torch
from schemes import SHAPE, tokens
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model
from llmnorm.modeling.initialization import expected_std

pytestmark = pytest.mark.fast

SLOTS = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_norm", "mlp_residual.entry")


def normalized_attention(layer: torch.nn.Module) -> Any:
    part = layer.self_attn
    return attention(layer, q=rms(part.q_norm), k=rms(part.k_norm), v=rms(part.v_norm))


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + normalized_attention(layer)(x)
    s = rms(layer.mlp_residual.entry)(x)
    return s + mlp(layer)(s)


@pytest.mark.parametrize("depth", [1, 4])
def test_attention_reads_the_raw_stream_and_the_mlp_joins_the_normalized_one(depth: int) -> None:
    assert_follows(model_of("hybrid_norm", depth=depth), block)


def test_hybrid_norm_has_three_norms_of_head_width_and_one_of_hidden_size_a_layer() -> None:
    model = model_of("hybrid_norm")
    assert norm_names(model) == names_in_layers(4, *SLOTS)
    layer = model.model.layers[2]
    widths = [layer.get_submodule(slot).weight.shape[0] for slot in SLOTS]
    assert widths == [8, 8, 8, 32]


@torch.no_grad()
def test_the_scale_of_the_stream_does_not_reach_what_attention_writes() -> None:
    """Without a norm on its input, attention is scale-free through its norms on q, k and v."""
    layer = model_of("hybrid_norm", depth=1).model.layers[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    write = normalized_attention(layer)
    torch.testing.assert_close(write(1e3 * x), write(1e6 * x), rtol=1e-6, atol=1e-8)


def test_output_projections_start_at_the_megatron_std() -> None:
    model = build_model(build_config(SHAPE, placement="hybrid_norm"))
    attn = model.model.layers[0].self_attn
    stds = [
        expected_std(f"model.layers.0.self_attn.{name}", getattr(attn, name), model.config)
        for name in ("o_proj", "v_proj")
    ]
    assert stds == pytest.approx([0.02 * 8**-0.5, 0.02])
    assert build_config(SHAPE, placement="hybrid_norm", init="plain").init == "plain"


@pytest.mark.parametrize("norm", ["layernorm", "dyt", "derf"])
def test_other_norms_act_per_head_too(norm: str) -> None:
    model = build_model(build_config(SHAPE, placement="hybrid_norm", norm=norm))
    assert model.model.layers[0].self_attn.v_norm.weight.shape == (8,)
    assert torch.isfinite(model(tokens()).logits).all()
