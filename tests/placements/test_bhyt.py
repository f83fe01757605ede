"""Full BHyT: the mlp's norm reuses the block's mean square and adds what attention should add."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from torch import nn
from torch.nn.functional import linear
from wiring import EPS, assert_follows, attention, copy_weights, mlp, model_of

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.residual import ResidualSpec, build_residual
from llmnorm.placements import Site, parse_placement

pytestmark = pytest.mark.fast

KAPPA, SEQ_LEN = 10.0, 24
FULL = {"name": "bhyt", "seq_len": SEQ_LEN}


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True)


def squashed(norm: nn.Module, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return norm.weight * torch.tanh(norm.lam * x / (KAPPA * torch.sqrt(m + EPS)))


def added(layer: nn.Module) -> torch.Tensor:
    """c (lam / kappa)^2 with the heads written out: c = |W_V^T W_O^T|_F^2 / (seq_len hidden)."""
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    head_dim, hidden = SHAPE["hidden_size"] // heads, SHAPE["hidden_size"]
    v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
    product = torch.zeros(hidden, hidden, dtype=v.dtype)
    for head in range(heads):
        group = head * groups // heads
        rows = v[group * head_dim : (group + 1) * head_dim]
        product += rows.T @ o[:, head * head_dim : (head + 1) * head_dim].T
    c = product.square().sum() / (SEQ_LEN * hidden)
    return c * (layer.attn_residual.pre.lam / KAPPA) ** 2


def block(number: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    v1 = mean_square(x)
    h = x + attention(layer)(squashed(layer.attn_residual.pre, x, v1))
    return h + mlp(layer)(squashed(layer.mlp_residual.pre, h, v1 + added(layer)))


def test_the_mlps_norm_reuses_the_blocks_mean_square() -> None:
    assert_follows(model_of(FULL, norm="bhyt"), block)


def test_a_sublayer_that_adds_nothing_leaves_the_star_form() -> None:
    """Without attention's output the estimate is exact: the mlp's input is the block's."""
    full, star = model_of(FULL, norm="bhyt"), model_of("pre_ln", norm="bhyt")
    with torch.no_grad():
        for layer in full.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    copy_weights(full, star)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(full(ids).logits, star(ids).logits, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("seq_len", [1, 48, 2048])
def test_what_attention_is_taken_to_add_falls_with_the_configured_length(seq_len: int) -> None:
    joints = [
        model_of({"name": "bhyt", "seq_len": length}, norm="bhyt").model.layers[1].mlp_residual
        for length in (seq_len, SEQ_LEN)
    ]
    one, other = (joint.growth().item() for joint in joints)
    assert one * seq_len == pytest.approx(other * SEQ_LEN)


def test_the_estimate_follows_the_weights_as_they_are_and_gives_them_no_gradient() -> None:
    layer = model_of(FULL, norm="bhyt").model.layers[2]
    before = layer.mlp_residual.growth()
    assert not before.requires_grad
    with torch.no_grad():
        layer.self_attn.v_proj.weight *= 3
        layer.attn_residual.pre.lam *= 2
    torch.testing.assert_close(layer.mlp_residual.growth(), 36 * before)


def test_gradients_reach_the_stream_and_the_block_input_as_the_formula_says() -> None:
    layer = model_of(FULL, norm="bhyt").model.layers[0]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, SHAPE["hidden_size"])
    x, x0 = (torch.randn(shape, generator=generator).double().requires_grad_() for _ in range(2))
    weight = torch.randn(8, shape[-1], generator=generator).double()

    def branch(h: torch.Tensor) -> torch.Tensor:
        return linear(linear(h, weight).sin(), weight.T)

    m = mean_square(x0) + added(layer).detach()
    by_hand = x + branch(squashed(layer.mlp_residual.pre, x, m))
    found = layer.mlp_residual(x, x0, branch)
    torch.testing.assert_close(found, by_hand, **TOLERANCE[torch.float64])
    over = (x, x0, layer.mlp_residual.pre.lam)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), over),
        torch.autograd.grad(by_hand.square().sum(), over),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])
    small = (x[:1, :1, :].detach().requires_grad_(), x0[:1, :1, :].detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: layer.mlp_residual(a, b, branch), small)


def test_the_final_norm_is_an_rmsnorm_unless_last_lam_is_given() -> None:
    assert type(model_of(FULL, norm="bhyt").model.norm).__name__ == "RMSNorm"
    with_last = model_of(FULL, norm={"op": "bhyt", "last_lam": 3.0})
    assert type(with_last.model.norm).__name__ == "BHyT"


def test_what_it_is_not_defined_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="placement bhyt is defined for norm bhyt; saw rmsnorm"):
        build_config(SHAPE, norm="rmsnorm", placement="bhyt")
    with pytest.raises(ConfigError, match=r"bhyt\.seq_len is 0; expected a whole number from 1"):
        build_config(SHAPE, norm="bhyt", placement={"name": "bhyt", "seq_len": 0})
    with pytest.raises(ConfigError, match="keep weights plain"):
        build_model(build_config(SHAPE, norm="bhyt", placement="bhyt", weights="weight_norm"))
    with pytest.raises(ValueError, match="is the mlp's, where both norms are bhyt"):
        build_residual(ResidualSpec(module="bhyt"), 32)


def test_the_constant_is_one_over_length_times_width() -> None:
    site = Site(kind="mlp", layer_idx=0, depth=4, num_attention_heads=4, hidden_size=32)
    spec = parse_placement(FULL).residual(site, build_config(SHAPE).final_norm_spec())
    assert spec.first.options == {"value": 1 / (SEQ_LEN * 32)}
