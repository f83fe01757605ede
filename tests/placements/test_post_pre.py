"""Post-Pre: Post-LN for attention, Pre-LN for the mlp (Zhuo et al. 2025, an ablation)."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = rms(layer.attn_residual.out)(x + attention(layer)(x))
    return x + mlp(layer)(rms(layer.mlp_residual.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_attention_is_post_ln_and_the_mlp_is_pre_ln(depth: int) -> None:
    assert_follows(model_of("post_pre", depth=depth), block)


def test_post_pre_has_two_norms_a_layer_and_a_final_one() -> None:
    wanted = names_in_layers(4, "attn_residual.out", "mlp_residual.pre")
    assert norm_names(model_of("post_pre")) == wanted
