"""Keel: y = N'(alpha x + F(N(x))), alpha the number of sublayers (Chen and Wei 2026)."""

import math
from typing import Any

import pytest
import torch
from schemes import TOLERANCE
from wiring import Block, assert_follows, attention, mlp, model_of, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError
from llmnorm.modeling.residual import NormSpec, Residual, ResidualSpec, constant
from llmnorm.placements import Site, parse_placement

pytestmark = pytest.mark.fast

DIM = 16


def block_at(alpha: float) -> Block:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        f = attention(layer)(rms(attn.pre)(x))
        x = x + f if number == 1 else rms(attn.out)(alpha * x + f)
        f = mlp(layer)(rms(feed.pre)(x))
        return rms(feed.out)((1.0 if number == 1 else alpha) * x + f)

    return block


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_keel_weighs_the_skip_by_the_number_of_sublayers_after_a_lighter_first_layer(
    depth: int,
) -> None:
    assert_follows(model_of("keel", depth=depth), block_at(2 * depth), final=False)


def test_a_smaller_alpha_may_be_given() -> None:
    model = model_of({"name": "keel", "alpha": 1.5}, depth=3)
    assert_follows(model, block_at(1.5), final=False)


def test_the_first_attention_has_no_outer_norm_and_there_is_no_final_norm() -> None:
    wanted = {
        f"layers.{i}.{part}_residual.{slot}.weight"
        for i in range(4)
        for part in ("attn", "mlp")
        for slot in ("pre", "out")
    }
    assert norm_names(model_of("keel")) == wanted - {"layers.0.attn_residual.out.weight"}


@pytest.mark.parametrize("alpha", [0, -1.0, "8", float("nan"), True])
def test_an_alpha_that_is_no_number_above_0_is_refused(alpha: object) -> None:
    with pytest.raises(ConfigError, match=r"keel\.alpha is"):
        build_config("debug", placement={"name": "keel", "alpha": alpha})


def sublayer(name: str, depth: int, **options: Any) -> Residual:
    """The residual of the last mlp, over DIM features, gains 1, hardly an eps."""
    site = Site(
        kind="mlp",
        layer_idx=depth - 1,
        depth=depth,
        num_attention_heads=1,
        hidden_size=DIM,
    )
    norm = NormSpec.parse({"op": "rmsnorm", "eps": 1e-30})
    spec = parse_placement({"name": name, **options}).residual(site, norm)
    return Residual(spec, DIM).double()


def basis() -> torch.Tensor:
    """Orthogonal rows of RMS 1."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=generator))[0]
    return rows * DIM**0.5


def gradient(residual: Residual) -> float:
    """Length of the skip's gradient for an upstream gradient of length 1, orthogonal to x and f.

    The branch writes f of RMS 1, orthogonal to x and independent of it.
    """
    x, f, dy = basis()[:3, None, None]
    x.requires_grad_()
    y = residual(x, x, lambda _: f)
    dx = torch.autograd.grad(y, x, dy / dy.norm())[0]
    return dx.norm().item()


@pytest.mark.parametrize("depth", [2, 12, 100])
def test_a_sublayer_multiplies_the_gradient_by_alpha_over_root_alpha_squared_plus_1(
    depth: int,
) -> None:
    """So 2 L sublayers keep nearly all of it, where Post-LN keeps 2^(-L)."""
    alpha = 2 * depth
    factor = gradient(sublayer("keel", depth))
    assert factor == pytest.approx(alpha / math.sqrt(alpha**2 + 1), rel=1e-12)
    assert factor**alpha == pytest.approx((1 + alpha**-2) ** (-alpha / 2), rel=1e-9)
    assert factor**alpha > 1 - 1 / alpha
    assert gradient(sublayer("post_ln", depth)) == pytest.approx(2**-0.5, rel=1e-12)


def test_keel_is_a_post_ln_whose_branch_is_divided_by_alpha() -> None:
    """N(alpha x + f) = N(x + f / alpha), with eps / alpha^2."""
    alpha, eps = 8.0, 1e-3
    pre, out = NormSpec.parse("rmsnorm"), NormSpec.parse({"op": "rmsnorm", "eps": eps})
    keel = Residual(ResidualSpec(pre=pre, skip=constant(alpha), out=out), DIM).double()
    post = ResidualSpec(pre=pre, post=constant(1 / alpha), out=out.having(eps=eps / alpha**2))
    x = 0.1 * basis()[None, :4]
    torch.testing.assert_close(
        keel(x, x, torch.sin),
        Residual(post, DIM).double()(x, x, torch.sin),
        **TOLERANCE[torch.float64],
    )
