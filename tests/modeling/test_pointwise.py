"""Point-wise norms against their formulas, written out here number by number."""

import math
from collections.abc import Callable

import pytest
import torch
from features import (
    DIM,
    assert_gradients_match_finite_differences,
    assert_same,
    features,
    norm_of,
    parameters,
)

from llmnorm.modeling.norms import Derf, DyT, Pointwise, alpha_at
from llmnorm.modeling.pointwise import FUNCTIONS
from llmnorm.modeling.residual import NormSpec

pytestmark = pytest.mark.fast


def sign(u: float) -> float:
    return math.copysign(1.0, u) if u else 0.0


def clip(u: float, bound: float = 1.0) -> float:
    return max(-bound, min(bound, u))


# The candidates of the Derf paper: f(u), and its slope at 0.
BY_HAND: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "erf": math.erf,
    "arctan": lambda u: 2 / math.pi * math.atan(u),
    "isru": lambda u: u / math.sqrt(u * u + 1),
    "satursin": lambda u: math.sin(clip(u, math.pi / 2)),
    "linear_clip": clip,
    "expsign": lambda u: sign(u) * (1 - math.exp(-abs(u))),
    "exproot": lambda u: sign(u) * (1 - math.exp(-math.sqrt(abs(u)))),
    "cubsign": lambda u: u**3 / (abs(u) ** 3 + 1),
    "relsign": lambda u: u / (math.sqrt(u * u + 1) + 1),
    "smoothsign": lambda u: u / (1 + abs(u)),
    "smoothsign_clip": lambda u: clip(u / (1 + abs(u))),
    "saturlog": lambda u: sign(u) * math.log(abs(u) + 1) / (math.log(abs(u) + 1) + 1),
    "logsign_clip": lambda u: clip(sign(u) * math.log(abs(u) + 1)),
    "logquad_clip": lambda u: clip(sign(u) * math.log(u * u + 1)),
    "power23_clip": lambda u: clip(sign(u) * abs(u) ** (2 / 3)),
}
SLOPE_AT_ZERO = {
    "tanh": 1.0,
    "erf": 2 / math.sqrt(math.pi),
    "arctan": 2 / math.pi,
    "isru": 1.0,
    "satursin": 1.0,
    "linear_clip": 1.0,
    "expsign": 1.0,
    "exproot": 1e3,  # of the chord to u = 1e-6
    "cubsign": 0.0,
    "relsign": 0.5,
    "smoothsign": 1.0,
    "smoothsign_clip": 1.0,
    "saturlog": 1.0,
    "logsign_clip": 1.0,
    "logquad_clip": 0.0,
    "power23_clip": 1e2,
}


def squashed(name: str, x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """f(alpha x + shift), number by number."""
    alpha, shift = p["alpha"].item(), p["shift"].item() if "shift" in p else 0.0
    rows = [[BY_HAND[name](alpha * v + shift) for v in row] for row in x.tolist()]
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_dyt_is_the_weighted_tanh_of_alpha_x(bias: bool) -> None:
    norm = norm_of("dyt", alpha=0.8, bias=bias, scale=0.7)
    p, x = parameters(norm), features(4, DIM)
    assert set(p) == {"alpha", "weight"} | ({"bias"} if bias else set())
    assert_same(norm(x), 0.7 * (squashed("tanh", x, p) * p["weight"] + p.get("bias", 0.0)))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(norm(x).sum(), x)
    assert_same(slope, 0.7 * p["weight"] * p["alpha"] * (1 - squashed("tanh", x.detach(), p) ** 2))


@pytest.mark.parametrize("bias", [True, False])
def test_derf_is_the_weighted_erf_of_alpha_x_plus_shift(bias: bool) -> None:
    norm = norm_of("derf", alpha=0.8, shift=0.2, bias=bias, scale=0.7)
    p, x = parameters(norm), features(4, DIM)
    assert_same(norm(x), 0.7 * (squashed("erf", x, p) * p["weight"] + p.get("bias", 0.0)))
    x.requires_grad_()
    slope, slope_shift = torch.autograd.grad(norm(x).sum(), [x, norm.shift])
    u = p["alpha"] * x.detach() + p["shift"]
    density = 0.7 * p["weight"] * (2 / math.sqrt(math.pi)) * torch.exp(-u * u)
    assert_same(slope, p["alpha"] * density)
    assert_same(slope_shift, density.sum()[None])


def test_the_family_is_that_of_the_paper() -> None:
    assert set(FUNCTIONS) == set(BY_HAND)
    assert len(FUNCTIONS) == 16


@pytest.mark.parametrize("name", BY_HAND)
def test_pointwise_is_the_weighted_function_of_alpha_x_plus_shift(name: str) -> None:
    norm = norm_of("pointwise", function=name, alpha=0.8, shift=0.2, scale=0.7)
    p, x = parameters(norm), 2.0 * features(4, DIM)
    assert set(p) == {"alpha", "shift", "weight", "bias"}
    assert_same(norm(x), 0.7 * (squashed(name, x, p) * p["weight"] + p["bias"]))
    assert_gradients_match_finite_differences(norm)


@pytest.mark.parametrize("name", BY_HAND)
def test_functions_are_odd_monotone_and_bounded_by_one(name: str) -> None:
    u = torch.cat((torch.linspace(0, 8, 4001), torch.logspace(1, 38, 200))).double()
    for values in (FUNCTIONS[name](u), FUNCTIONS[name](u.float())):
        assert values[0] == 0
        assert torch.equal(FUNCTIONS[name](-u.to(values.dtype)), -values)
        assert (values.diff() >= -torch.finfo(values.dtype).eps).all()
        assert values.max() <= 1
        assert values[-1] > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_are_finite_everywhere_and_known_at_zero(name: str, dtype: torch.dtype) -> None:
    u = torch.tensor(
        [0.0, 1e-45, 1e-12, 1e-7, 0.5, 1.0, math.pi / 2, 50.0, 1e9, 1e20, 3e38], dtype=dtype
    )
    u = torch.cat((u, -u)).requires_grad_()
    (slope,) = torch.autograd.grad(FUNCTIONS[name](u).sum(), u)
    assert torch.isfinite(slope).all()
    assert (slope >= -1e-7).all()  # cos(pi/2) in float32 is -4e-8
    assert slope.max() <= max(1e3, SLOPE_AT_ZERO[name]) * (1 + 1e-6)
    assert slope[0].item() == pytest.approx(SLOPE_AT_ZERO[name], rel=1e-6)


@pytest.mark.parametrize("name", ["exproot", "power23_clip"])
def test_the_straight_line_near_zero_moves_a_root_by_less_than_a_thousandth(name: str) -> None:
    u = torch.linspace(0, 2e-6, 2001, dtype=torch.float64)
    exact = torch.tensor([BY_HAND[name](v) for v in u.tolist()], dtype=torch.float64)
    off = (FUNCTIONS[name](u) - exact).abs()
    assert 0 < off.max() < 3e-4
    assert off[1001:].max() < 1e-12  # above 1e-6 the formula is exact


@pytest.mark.parametrize("cls", [DyT, Derf, Pointwise])
def test_point_wise_norms_are_bounded_by_their_weight_and_act_on_each_element_alone(
    cls: type,
) -> None:
    norm = cls(DIM, bias=False).double()
    x = 1e6 * features(4, DIM)
    assert norm(x).abs().max() <= 1.0
    torch.testing.assert_close(norm(x).abs(), torch.ones_like(x))
    moved = features(1, DIM).clone()
    before = norm(moved)
    moved[0, 0] += 1.0
    assert torch.equal(norm(moved)[0, 1:], before[0, 1:])


def test_pointwise_with_tanh_and_erf_are_dyt_and_derf() -> None:
    x = features(4, DIM)
    tanh = Pointwise(DIM, function="tanh", alpha=0.7, bias=False)
    assert torch.equal(tanh(x), DyT(DIM, alpha=0.7)(x))
    assert torch.equal(Pointwise(DIM, alpha=0.7, shift=0.1)(x), Derf(DIM, alpha=0.7, shift=0.1)(x))


@pytest.mark.parametrize("cls", [DyT, Derf])
def test_bf16_alpha_and_features_multiply_in_float32(cls: type) -> None:
    x = (3.3 * features(64, DIM)).bfloat16()
    norm = cls(DIM, alpha=0.37).bfloat16()
    squash = torch.tanh if cls is DyT else torch.erf
    exact = squash(norm.alpha.double() * x.double()).bfloat16()
    assert torch.equal(norm(x), exact)
    assert not torch.equal(squash(norm.alpha * x), exact)


# --- alpha by width and site ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "attn", "other"),
    [(1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (8192, 0.2, 0.05)],
)
def test_alpha_of_a_published_width_is_the_published_one(
    width: int, attn: float, other: float
) -> None:
    assert alpha_at("attn", width) == attn
    assert alpha_at("mlp", width) == other
    assert alpha_at("final", width) == other


def test_alpha_between_two_widths_is_linear_in_log2() -> None:
    middle = round(2048 * 2**0.5)
    t = math.log2(middle / 2048)
    assert alpha_at("attn", middle) == pytest.approx(1.0 + t * (0.8 - 1.0))
    assert alpha_at("mlp", middle) == pytest.approx(0.5 + t * (0.2 - 0.5))
    t = math.log2(6144 / 5120) / math.log2(8192 / 5120)
    assert alpha_at("final", 6144) == pytest.approx(0.15 + t * (0.05 - 0.15))


def test_alpha_is_constant_outside_the_table() -> None:
    assert alpha_at("attn", 32) == alpha_at("mlp", 768) == 1.0
    assert (alpha_at("attn", 65536), alpha_at("mlp", 65536)) == (0.2, 0.05)


@pytest.mark.parametrize("name", ["dyt", "derf", "pointwise"])
def test_a_spec_takes_alpha_from_the_table_or_from_a_mapping_of_sites(name: str) -> None:
    assert NormSpec.parse(name).at("attn", 4096).options["alpha"] == 0.8
    assert NormSpec.parse(name).at("final", 4096).options["alpha"] == 0.2
    mapped = NormSpec.parse({"op": name, "alpha": {"attn": 0.7, "final": 0.3}})
    alphas = [mapped.at(kind, 4096).options["alpha"] for kind in ("attn", "mlp", "final")]
    assert alphas == [0.7, 0.2, 0.3]  # mlp is not mapped: the table's
    fixed = NormSpec.parse({"op": name, "alpha": 0.5})
    assert {fixed.at(kind, 4096).options["alpha"] for kind in ("attn", "mlp", "final")} == {0.5}


def test_a_mapping_with_an_unknown_site_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha has no site 'atn'; its sites: attn, mlp, final"):
        NormSpec.parse({"op": "dyt", "alpha": {"atn": 1.0}}).at("attn", 64)
