"""Res-Post-LN: y = x + N(F(x)), the reordered norm of OLMo 2 and Swin v2."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + rms(layer.attn_residual.post)(attention(layer)(x))
    return x + rms(layer.mlp_residual.post)(mlp(layer)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_res_post_ln_normalizes_each_branch_and_nothing_it_reads(depth: int) -> None:
    assert_follows(model_of("res_post_ln", depth=depth), block)


def test_res_post_ln_has_two_norms_a_layer_and_a_final_one() -> None:
    slots = ("attn_residual.post", "mlp_residual.post")
    assert norm_names(model_of("res_post_ln")) == names_in_layers(4, *slots)


def test_olmo_2_is_res_post_ln_with_full_width_norms_on_queries_and_keys() -> None:
    model = model_of("res_post_ln", qk_norm="full_width")
    attn = model.model.layers[0].self_attn
    assert (tuple(attn.q_norm.weight.shape), tuple(attn.k_norm.weight.shape)) == ((32,), (16,))


def test_res_post_ln_has_no_options() -> None:
    with pytest.raises(ConfigError, match="res_post_ln has no option 'scale'"):
        build_config("debug", placement={"name": "res_post_ln", "scale": 1.0})
