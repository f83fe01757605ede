"""Sandwich-LN: y = x + N'(F(N(x))) on a raw embedding (Ding et al. 2021)."""

import pytest
import torch
from schemes import tokens
from wiring import (
    assert_follows,
    attention,
    copy_weights,
    mlp,
    model_of,
    names_in_layers,
    norm_names,
    rms,
)

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    x = x + rms(attn.post)(attention(layer)(rms(attn.pre)(x)))
    return x + rms(feed.post)(mlp(layer)(rms(feed.pre)(x)))


@pytest.mark.parametrize("depth", [1, 4])
def test_sandwich_ln_normalizes_before_and_after_each_sublayer(depth: int) -> None:
    assert_follows(model_of("sandwich_ln", depth=depth), block)


def test_sandwich_ln_has_four_norms_a_layer_a_final_one_and_none_on_the_embedding() -> None:
    slots = [f"{part}_residual.{slot}" for part in ("attn", "mlp") for slot in ("pre", "post")]
    assert norm_names(model_of("sandwich_ln")) == names_in_layers(4, *slots)


def test_sandwich_ln_is_peri_ln_with_a_raw_embedding() -> None:
    sandwich, peri = model_of("sandwich_ln"), model_of("peri_ln", embedding="raw")
    copy_weights(sandwich, peri)
    assert torch.equal(sandwich(tokens()).logits, peri(tokens()).logits)
    assert build_config("debug", placement="sandwich_ln").embedding == "raw"


def test_sandwich_ln_has_no_options() -> None:
    with pytest.raises(ConfigError, match="sandwich_ln has no option 'max_scaling'"):
        build_config("debug", placement={"name": "sandwich_ln", "max_scaling": True})
