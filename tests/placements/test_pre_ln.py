"""Pre-LN: y = x + F(N(x)), and a norm before the head (Xiong et al. 2020)."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(layer)(rms(layer.attn_residual.pre)(x))
    return x + mlp(layer)(rms(layer.mlp_residual.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_pre_ln_normalizes_what_each_sublayer_reads(depth: int) -> None:
    assert_follows(model_of("pre_ln", depth=depth), block)


def test_pre_ln_has_two_norms_a_layer_and_a_final_one() -> None:
    model = model_of("pre_ln")
    assert norm_names(model) == names_in_layers(4, "attn_residual.pre", "mlp_residual.pre")


def test_pre_ln_leaves_a_block_with_silent_sublayers_an_identity() -> None:
    model = model_of("pre_ln")
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = (torch.ones(1, 3, 8).double(), torch.zeros(1, 3, 8).double())
    assert torch.equal(layer(x, rotary=table), x)


def test_pre_ln_has_plain_init_raw_embedding_and_no_options() -> None:
    config = build_config("debug", placement="pre_ln")
    assert (config.init, config.embedding) == ("plain", "raw")
    with pytest.raises(ConfigError, match="pre_ln has no option 'alpha'; its options: none"):
        build_config("debug", placement={"name": "pre_ln", "alpha": 1.0})
