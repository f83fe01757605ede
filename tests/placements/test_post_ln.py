"""Post-LN: y = N(x + F(x)), no final norm (Vaswani et al. 2017)."""

import pytest
import torch
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = rms(layer.attn_residual.out)(x + attention(layer)(x))
    return rms(layer.mlp_residual.out)(x + mlp(layer)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_post_ln_normalizes_the_stream_after_each_addition(depth: int) -> None:
    assert_follows(model_of("post_ln", depth=depth), block, final=False)


def test_post_ln_has_no_final_norm_since_its_last_operation_is_one() -> None:
    model = model_of("post_ln")
    slots = ("attn_residual.out", "mlp_residual.out")
    assert norm_names(model) == names_in_layers(4, *slots, final=False)
    assert type(model.model.norm) is torch.nn.Identity


def test_post_ln_has_no_options() -> None:
    with pytest.raises(ConfigError, match="post_ln has no option 'fraction'"):
        build_config("debug", placement={"name": "post_ln", "fraction": 1.0})
