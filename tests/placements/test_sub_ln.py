"""Sub-LN: a second norm before each output projection (Magneto, Wang et al. 2022)."""

import math

import pytest
import torch
from schemes import SHAPE
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError
from llmnorm.modeling.initialization import Matrix, sub_ln

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(layer, rms(layer.self_attn.inner))(rms(layer.attn_residual.pre)(x))
    return x + mlp(layer, rms(layer.mlp.inner))(rms(layer.mlp_residual.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_sub_ln_normalizes_what_sublayers_and_output_projections_read(depth: int) -> None:
    assert_follows(model_of("sub_ln", depth=depth), block)


def test_sub_ln_has_four_norms_a_layer_of_the_widths_they_act_on() -> None:
    model = model_of("sub_ln")
    slots = ("attn_residual.pre", "self_attn.inner", "mlp_residual.pre", "mlp.inner")
    assert norm_names(model) == names_in_layers(4, *slots)
    assert model.model.layers[0].mlp.inner.weight.shape == (SHAPE["intermediate_size"],)


@pytest.mark.parametrize("depth", [1, 6, 24])
def test_the_value_path_starts_larger_by_sqrt_of_log_of_2_l(depth: int) -> None:
    shape = {
        "number": 1,
        "depth": depth,
        "hidden_size": 50,
        "fan_in": 40,
        "fan_out": 60,
        "initializer_range": 9.0,
    }
    xavier = math.sqrt(2 / 100)
    for name in ("q_proj", "k_proj"):
        assert sub_ln(Matrix(name=name, **shape)) == pytest.approx(xavier)
    for name in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        wanted = xavier * math.sqrt(math.log(2 * depth))
        assert sub_ln(Matrix(name=name, **shape)) == pytest.approx(wanted)


def test_sub_ln_brings_its_own_init_and_has_no_options() -> None:
    assert build_config("debug", placement="sub_ln").init == "sub_ln"
    with pytest.raises(ConfigError, match="sub_ln has no option 'gain'"):
        build_config("debug", placement={"name": "sub_ln", "gain": 1.0})
