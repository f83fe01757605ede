"""SpanNorm: h = N(x + A(x)), y = N'(x + F(h)) with x the block's input (Wang et al. 2026)."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    read = rms(attn.pre)(x) if number == 1 else x
    h = rms(attn.out)(x + attention(layer)(read))
    return rms(feed.out)(x + mlp(layer)(h))


@pytest.mark.parametrize("depth", [1, 4])
def test_the_mlps_skip_starts_at_the_blocks_input(depth: int) -> None:
    assert_follows(model_of("span_norm", depth=depth), block, final=False)


def test_attention_reaches_the_stream_through_the_mlp_alone() -> None:
    model = model_of("span_norm", depth=2)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = (torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double())
    torch.testing.assert_close(layer(x, rotary=table), rms(layer.mlp_residual.out)(x))


def test_span_norm_has_two_norms_a_layer_one_on_the_first_attentions_input_and_no_final_one() -> (
    None
):
    wanted = names_in_layers(4, "attn_residual.out", "mlp_residual.out", final=False)
    assert norm_names(model_of("span_norm")) == wanted | {"layers.0.attn_residual.pre.weight"}


def test_output_projections_start_scaled_by_depth() -> None:
    assert build_config("debug", placement="span_norm").init == "scaled"
