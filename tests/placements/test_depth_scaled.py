"""Depth scaling: Pre-LN whose branches are divided by n or sqrt(n), n residual modules."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from wiring import assert_follows, attention, copy_weights, mlp, model_of, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize(("count", "a_layer"), [({}, 2), ({"count": "layers"}, 1)])
def test_each_branch_is_divided_by_a_power_of_the_number_of_modules(
    depth: int, power: float, count: dict[str, str], a_layer: int
) -> None:
    n = a_layer * depth

    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x + attention(layer)(rms(layer.attn_residual.pre)(x)) / n**power
        return x + mlp(layer)(rms(layer.mlp_residual.pre)(x)) / n**power

    assert_follows(model_of({"name": "depth_scaled", "power": power, **count}, depth=depth), block)


def test_it_is_pre_ln_with_smaller_output_projections() -> None:
    scaled, pre = model_of("depth_scaled"), model_of("pre_ln")
    copy_weights(scaled, pre)
    with torch.no_grad():
        for layer in pre.model.layers:
            layer.self_attn.o_proj.weight /= 8
            layer.mlp.down_proj.weight /= 8
    ids = torch.arange(12)[None]
    torch.testing.assert_close(scaled(ids).logits, pre(ids).logits, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(("power", "bound"), [(1.0, 1.0), (0.5, None)])
def test_power_1_bounds_the_sum_of_any_branches_by_the_largest(
    power: float, bound: float | None
) -> None:
    config = build_config(
        SHAPE, placement={"name": "depth_scaled", "power": power}, num_hidden_layers=50
    )
    total = sum(s["post"]["value"] for layer in config.residuals for s in layer.values())
    squares = sum(s["post"]["value"] ** 2 for layer in config.residuals for s in layer.values())
    assert (total if bound else squares) == pytest.approx(1.0)


def test_the_power_is_above_0() -> None:
    with pytest.raises(ConfigError, match=r"depth_scaled\.power is -1; expected a number above 0"):
        build_config(SHAPE, placement={"name": "depth_scaled", "power": -1})


def test_an_unknown_count_is_refused() -> None:
    with pytest.raises(ConfigError, match="count is 'blocks'; expected 'sublayers' or 'layers'"):
        build_config(SHAPE, placement={"name": "depth_scaled", "count": "blocks"})
