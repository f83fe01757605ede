"""CompleteP: branches divided by m_L^alpha, and muP with the same base (Dey et al. 2025)."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from wiring import assert_follows, attention, copy_weights, mlp, model_of, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_each_branch_is_divided_by_a_power_of_the_depth_ratio(depth: int, alpha: float) -> None:
    factor = (depth / 2) ** -alpha

    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x + factor * attention(layer)(rms(layer.attn_residual.pre)(x))
        return x + factor * mlp(layer)(rms(layer.mlp_residual.pre)(x))

    placement = {"name": "completep", "base_depth": 2, "alpha": alpha}
    model = model_of(placement, depth=depth, parametrization="standard")
    assert_follows(model, block)


def test_at_the_base_shape_it_is_pre_ln_but_for_attentions_scale() -> None:
    placement = {"name": "completep", "base_width": 32, "base_depth": 4}
    completep, pre = model_of(placement), model_of("pre_ln")
    copy_weights(completep, pre)
    with torch.no_grad():
        for layer in pre.model.layers:
            layer.self_attn.q_proj.weight /= 8**0.5  # head_dim is 8
    ids = torch.arange(12)[None]
    torch.testing.assert_close(completep(ids).logits, pre(ids).logits, **TOLERANCE[torch.float64])
    assert completep.config.logits is None


def test_its_parametrization_is_mup_with_its_base() -> None:
    placement = {"name": "completep", "base_width": 16, "base_depth": 2, "alpha": 0.5}
    config = build_config(SHAPE, placement=placement)
    assert config.parametrization == {
        "name": "mup",
        "base_width": 16,
        "base_depth": 2,
        "alpha": 0.5,
    }
    assert config.logits == {"op": "constant", "value": 0.5}


@pytest.mark.parametrize("option", ["base_width", "base_depth", "alpha"])
def test_its_options_are_above_0(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"completep\.{option} is 0; expected a number above 0"):
        build_config(SHAPE, placement={"name": "completep", option: 0})
