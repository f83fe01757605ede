"""LayerScale: a small learned vector on each branch of Pre-LN (Touvron et al. 2021)."""

import pytest
import torch
from schemes import SHAPE
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

SLOTS = ("attn_residual.pre", "attn_residual.post", "mlp_residual.pre", "mlp_residual.post")


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    x = x + attn.post.weight * attention(layer)(rms(attn.pre)(x))
    return x + feed.post.weight * mlp(layer)(rms(feed.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_layerscale_multiplies_each_feature_of_a_branch(depth: int) -> None:
    assert_follows(model_of("layerscale", depth=depth), block)


def test_layerscale_adds_one_vector_a_branch_to_pre_ln() -> None:
    model = model_of("layerscale")
    assert norm_names(model) == names_in_layers(4, *SLOTS)
    assert model.model.layers[0].attn_residual.post.weight.shape == (32,)


def test_the_gain_folds_into_the_rows_of_the_output_projection() -> None:
    model = model_of("layerscale", depth=1)
    layer = model.model.layers[0]
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = layer.attn_residual.post.weight * attention(layer)(x)
    with torch.no_grad():
        layer.self_attn.o_proj.weight *= layer.attn_residual.post.weight[:, None]
    torch.testing.assert_close(attention(layer)(x), wanted)


@pytest.mark.parametrize(
    ("depth", "start"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)]
)
def test_the_start_is_smaller_in_deeper_stacks(depth: int, start: float) -> None:
    config = build_config(SHAPE, placement="layerscale", num_hidden_layers=depth)
    assert config.residuals[-1]["mlp"]["post"] == {"op": "gain", "value": start}


def test_the_start_is_an_option_above_0() -> None:
    config = build_config(SHAPE, placement={"name": "layerscale", "value": 0.25})
    model = build_model(config)
    assert model.model.layers[2].attn_residual.post.weight.tolist() == [0.25] * 32
    with pytest.raises(ConfigError, match=r"layerscale\.value is 0; expected a number above 0"):
        build_config(SHAPE, placement={"name": "layerscale", "value": 0})
