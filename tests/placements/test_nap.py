"""Normalize-and-project: Pre-LN with normalized inputs of every activation, and constant norms."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from torch.nn.functional import gelu, linear, silu
from wiring import assert_follows, attention, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    part = layer.mlp
    x = x + attention(layer)(rms(layer.attn_residual.pre)(x))
    s = rms(layer.mlp_residual.pre)(x)
    gate = silu(rms(part.gate)(linear(s, part.gate_proj.weight)))
    up = rms(part.up)(linear(s, part.up_proj.weight))
    return x + linear(gate * up, part.down_proj.weight)


@pytest.mark.parametrize("depth", [1, 4])
def test_nap_normalizes_what_the_mlps_activation_reads(depth: int) -> None:
    assert_follows(model_of("nap", depth=depth), block)


def test_a_plain_mlp_normalizes_before_its_activation() -> None:
    model = model_of("nap", depth=1, mlp="plain", hidden_act="gelu")
    part = model.model.layers[0].mlp
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = linear(gelu(rms(part.up)(linear(x, part.up_proj.weight))), part.down_proj.weight)
    torch.testing.assert_close(part(x), wanted, **TOLERANCE[torch.float64])


def test_nap_has_two_more_norms_a_layer_than_pre_ln() -> None:
    slots = ("attn_residual.pre", "mlp_residual.pre", "mlp.gate", "mlp.up")
    assert norm_names(model_of("nap")) == names_in_layers(4, *slots)


def test_naps_weights_are_projected_unless_a_run_says_otherwise() -> None:
    assert build_config(SHAPE, placement="nap").weights == {"kind": "project"}
    assert build_config(SHAPE, placement="nap", weights="plain").weights == "plain"
