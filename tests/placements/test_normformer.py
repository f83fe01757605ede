"""NormFormer: Pre-LN with head gains, a norm on attention's output and one inside the mlp."""

import pytest
import torch
from schemes import SHAPE
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

SLOTS = (
    "attn_residual.pre",
    "self_attn.inner",
    "attn_residual.post",
    "mlp_residual.pre",
    "mlp.inner",
)


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    heads, head_dim = 4, 8
    gain = layer.self_attn.inner.weight.repeat_interleave(head_dim)
    assert gain.shape == (heads * head_dim,)
    x = x + rms(attn.post)(attention(layer, lambda c: gain * c)(rms(attn.pre)(x)))
    skip = getattr(feed.skip, "weight", 1.0)
    return skip * x + mlp(layer, rms(layer.mlp.inner))(rms(feed.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("res_scale", [False, True])
def test_normformer_adds_its_three_operations_to_pre_ln(depth: int, res_scale: bool) -> None:
    placement = {"name": "normformer", "res_scale": res_scale}
    assert_follows(model_of(placement, depth=depth), block)


def test_normformer_parameters_are_a_gain_a_head_and_norms_of_the_width_they_act_on() -> None:
    model = model_of("normformer")
    assert norm_names(model) == names_in_layers(4, *SLOTS)
    layer = model.model.layers[0]
    assert layer.self_attn.inner.weight.shape == (4,)
    assert layer.mlp.inner.weight.shape == (SHAPE["intermediate_size"],)
    assert layer.attn_residual.post.weight.shape == (32,)


def test_the_head_gain_stands_before_the_output_projection() -> None:
    """A gain of 0 removes one head wholly; after the projection it could only remove channels."""
    model = model_of("normformer", depth=1)
    attn = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = (torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double())
    with torch.no_grad():
        attn.inner.weight[2] = 0.0
        silent = attn(x, rotary=table)
        attn.inner.weight[2] = 5.0
        attn.o_proj.weight[:, 16:24] = 0.0  # the columns that read head 2
        assert torch.allclose(attn(x, rotary=table), silent)
    assert (silent != 0).all()


def test_res_scale_learns_a_gain_per_feature_on_the_skip_of_the_mlp_alone() -> None:
    placement = {"name": "normformer", "res_scale": True}
    model = build_model(build_config(SHAPE, placement=placement))
    assert norm_names(model) == names_in_layers(4, *SLOTS, "mlp_residual.skip")
    skip = model.model.layers[0].mlp_residual.skip.weight
    assert skip.tolist() == [1.0] * 32


def test_head_gains_start_at_one() -> None:
    model = build_model(build_config(SHAPE, placement="normformer"))
    assert model.model.layers[3].self_attn.inner.weight.tolist() == [1.0] * 4


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no option 'scale_resids'; its options: res_scale"):
        build_config("debug", placement={"name": "normformer", "scale_resids": True})


@pytest.mark.parametrize("value", ["no", "false", 0.5, None])
def test_res_scale_must_be_true_or_false(value: object) -> None:
    with pytest.raises(ConfigError, match=r"normformer\.res_scale"):
        build_config("debug", placement={"name": "normformer", "res_scale": value})
