"""LayerNorm Scaling: Pre-LN with norm outputs times 1/sqrt(l), l 1-based (Sun et al. 2025)."""

import pytest
import torch
from schemes import TOLERANCE, tokens
from wiring import assert_follows, attention, copy_weights, mlp, model_of, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(layer)(rms(layer.attn_residual.pre)(x) / number**0.5)
    return x + mlp(layer)(rms(layer.mlp_residual.pre)(x) / number**0.5)


@pytest.mark.parametrize("depth", [1, 5])
def test_lns_divides_what_layer_l_reads_by_sqrt_l_counting_layers_not_sublayers(depth: int) -> None:
    assert_follows(model_of("lns", depth=depth), block)


def test_lns_in_layer_1_is_pre_ln_bit_for_bit() -> None:
    lns, pre = model_of("lns", depth=1), model_of("pre_ln", depth=1)
    copy_weights(lns, pre)
    assert torch.equal(lns(tokens()).logits, pre(tokens()).logits)


def test_lns_is_pre_ln_with_gains_divided_by_sqrt_l() -> None:
    """The fold that exports an LNS model to a stock Llama; the final gain stays."""
    lns, pre = model_of("lns", depth=4), model_of("pre_ln", depth=4)
    weights = {name: value.clone() for name, value in lns.state_dict().items()}
    for number in range(1, 5):
        for kind in ("attn", "mlp"):
            weights[f"model.layers.{number - 1}.{kind}_residual.pre.weight"] /= number**0.5
    pre.load_state_dict(weights)
    torch.testing.assert_close(
        lns(tokens()).logits, pre(tokens()).logits, **TOLERANCE[torch.float64]
    )


def test_the_final_norm_is_not_scaled() -> None:
    config = build_config("debug", placement="lns")
    scales = [layer["attn"]["pre"]["scale"] for layer in config.residuals]
    assert scales == [number**-0.5 for number in range(1, 5)]
    assert [layer["mlp"]["pre"]["scale"] for layer in config.residuals] == scales
    assert config.final_norm["scale"] == 1.0


@pytest.mark.parametrize("norm", ["layernorm", "dyt", "derf"])
def test_every_norm_takes_the_scale_on_its_whole_output(norm: str) -> None:
    model = model_of("lns", norm=norm)
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pre = model.model.layers[2].attn_residual.pre
    bare = type(pre)(32, **{"eps": 1e-6} if norm == "layernorm" else {}, bias=pre.bias is not None)
    bare.double().load_state_dict(pre.state_dict())
    torch.testing.assert_close(pre(x), bare(x) / 3**0.5, **TOLERANCE[torch.float64])


def test_lns_starts_from_plain_init() -> None:
    assert build_config("debug", placement="lns").init == "plain"


def test_a_scale_of_the_norm_itself_is_kept_beside_the_depths() -> None:
    norm = {"op": "rmsnorm", "scale": 2.0}
    config = build_config("debug", norm=norm, placement="lns")
    assert config.residuals[3]["attn"]["pre"]["scale"] == 2.0 * 4**-0.5
    assert config.final_norm["scale"] == 2.0


def test_lns_has_no_options() -> None:
    with pytest.raises(ConfigError, match="lns has no option 'power'"):
        build_config("debug", placement={"name": "lns", "power": 0.5})
