"""Pre-Post: Pre-LN for attention, Post-LN for the mlp (Zhuo et al. 2025, an ablation)."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(layer)(rms(layer.attn_residual.pre)(x))
    return rms(layer.mlp_residual.out)(x + mlp(layer)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_attention_is_pre_ln_and_the_mlp_is_post_ln(depth: int) -> None:
    assert_follows(model_of("pre_post", depth=depth), block)


def test_pre_post_keeps_the_final_norm() -> None:
    wanted = names_in_layers(4, "attn_residual.pre", "mlp_residual.out")
    assert norm_names(model_of("pre_post")) == wanted
