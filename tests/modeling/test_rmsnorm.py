"""RMSNorm, its kin and LayerNorm against their formulas, written out here by hand."""

import math

import pytest
import torch
from features import (
    DIM,
    assert_follows_formula,
    assert_gradients_match_finite_differences,
    assert_same,
    features,
    norm_of,
    parameters,
)

from llmnorm.modeling.norms import CRMSNorm, LayerNorm, RMSNorm, SimpleRMSNorm
from llmnorm.modeling.operations import operation

pytestmark = pytest.mark.fast

Parameters = dict[str, torch.Tensor]


def root_mean_squares(x: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """sqrt(mean(x^2) + eps) of each row, number by number."""
    return torch.stack([torch.sqrt(sum(v * v for v in row) / len(row) + eps) for row in x])[:, None]


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_divides_by_the_root_mean_square_with_eps_inside(eps: float, scale: float) -> None:
    assert_follows_formula(
        norm_of("rmsnorm", eps=eps, scale=scale),
        lambda x, p: scale * x / root_mean_squares(x, eps) * p["weight"],
    )


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_rmsnorm_of_the_papers_code_has_eps_outside_and_an_offset(eps: float) -> None:
    norm = norm_of("rmsnorm", eps=eps, eps_placement="outside", bias=True, scale=0.5)
    assert set(parameters(norm)) == {"weight", "bias"}
    assert_follows_formula(
        norm, lambda x, p: 0.5 * (x / (root_mean_squares(x) + eps) * p["weight"] + p["bias"])
    )


def test_rmsnorm_with_a_scalar_gain_has_one_weight() -> None:
    norm = norm_of("rmsnorm", gain="scalar", weight_init=0.3)
    assert norm.weight.shape == (1,)
    assert_follows_formula(norm, lambda x, p: x / root_mean_squares(x, 1e-6) * p["weight"])


def test_rmsnorm_with_unit_offset_multiplies_by_one_plus_a_weight_that_starts_at_zero() -> None:
    assert not RMSNorm(DIM, unit_offset=True).weight.any()
    assert_follows_formula(
        norm_of("rmsnorm", unit_offset=True, scale=0.5),
        lambda x, p: 0.5 * x / root_mean_squares(x, 1e-6) * (1 + p["weight"]),
    )


@pytest.mark.parametrize("offset", [False, True])
def test_weight_init_is_the_initial_gain_with_and_without_unit_offset(offset: bool) -> None:
    x = features(3, DIM)
    damped = RMSNorm(DIM, weight_init=0.2, unit_offset=offset)
    torch.testing.assert_close(damped(x), 0.2 * RMSNorm(DIM)(x))
    assert damped.weight[0].item() == pytest.approx(0.2 - offset)
    layer = LayerNorm(DIM, weight_init=0.2)
    torch.testing.assert_close(layer(x), 0.2 * LayerNorm(DIM)(x))


@pytest.mark.parametrize("p", [0.01, 0.0625, 0.25, 1.0])
def test_prmsnorm_measures_the_first_features_and_divides_all(p: float) -> None:
    norm = norm_of("prmsnorm", p=p, eps=0.05)
    k = max(1, int(p * DIM))
    assert_follows_formula(
        norm, lambda x, q: q["weight"] * x / (root_mean_squares(x[:, :k]) + 0.05)
    )
    x = features(2, DIM)
    other = x.clone()
    other[:, k:] *= 3.0
    assert_same(norm(other)[:, :k], norm(x)[:, :k])  # what is not measured moves nothing else


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_crmsnorm_divides_by_the_width_it_stands_for(eps: float) -> None:
    def by_hand(x: torch.Tensor, _: Parameters) -> torch.Tensor:
        rows = []
        for row in x:
            squares = sum(v * v for v in row) + sum(row) ** 2
            rows.append(row / torch.sqrt(squares / (DIM + 1) + eps))
        return 0.5 * torch.stack(rows)

    assert_follows_formula(norm_of("crmsnorm", eps=eps, scale=0.5), by_hand)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_layernorm_uses_the_biased_variance_and_scales_the_bias_too(eps: float, bias: bool) -> None:
    norm = norm_of("layernorm", eps=eps, bias=bias, scale=0.7)
    assert set(parameters(norm)) == ({"weight", "bias"} if bias else {"weight"})

    def by_hand(x: torch.Tensor, p: Parameters) -> torch.Tensor:
        rows = []
        for row in x:
            mean = sum(row) / len(row)
            variance = sum((v - mean) ** 2 for v in row) / len(row)  # biased
            rows.append((row - mean) / torch.sqrt(variance + eps))
        return 0.7 * (torch.stack(rows) * p["weight"] + p.get("bias", 0.0))

    assert_follows_formula(norm, by_hand)


def test_rmsnorm_gradient_is_the_projection_off_its_own_output() -> None:
    """d/dx of g . x/rms(x): (g - xhat * mean(g * xhat)) / rms, with eps in the root."""
    norm = norm_of("rmsnorm", eps=0.05, scale=0.5)
    x, g = features(3, DIM).requires_grad_(), features(3, DIM, seed=1)
    (found,) = torch.autograd.grad((norm(x) * g).sum(), x)
    rms = root_mean_squares(x.detach(), 0.05)
    xhat, pulled = x.detach() / rms, 0.5 * g * parameters(norm)["weight"]
    assert_same(found, (pulled - xhat * (pulled * xhat).mean(-1, keepdim=True)) / rms)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("rmsnorm", {"elementwise_affine": False}),
        ("rmsnorm", {"cast": "input"}),
        ("rmsnorm", {"eps_placement": "outside", "bias": True}),
        ("rmsnorm", {"unit_offset": True, "gain": "scalar"}),
        ("layernorm", {"bias": False}),
        ("layernorm", {"elementwise_affine": False}),
        ("prmsnorm", {"p": 0.5}),
    ],
)
def test_gradients_of_the_variants_match_finite_differences(op: str, options: dict) -> None:
    assert_gradients_match_finite_differences(norm_of(op, **options))


# --- invariances and equalities ---------------------------------------------------------------


@pytest.mark.parametrize("op", ["rmsnorm", "simple_rmsnorm", "prmsnorm", "crmsnorm", "layernorm"])
def test_norms_of_a_mean_square_are_scale_free_up_to_eps(op: str) -> None:
    x, norm = features(4, DIM), norm_of(op, eps=1e-12)
    assert_same(norm(37.0 * x), norm(x))
    assert torch.allclose(norm(x + 1.0), norm(x)) == (op == "layernorm")  # the mean is kept


def test_eps_inside_the_root_does_not_normalize_a_tiny_token_up_and_outside_does() -> None:
    tiny = 1e-6 * features(4, DIM)
    assert RMSNorm(DIM, eps=1e-6).double()(tiny).abs().max() < 1e-2
    outside = RMSNorm(DIM, eps=1e-8, eps_placement="outside").double()
    torch.testing.assert_close(outside(tiny), outside(1e6 * tiny), rtol=0.02, atol=0)


def test_simple_rmsnorm_is_rmsnorm_without_a_gain() -> None:
    x = features(4, DIM)
    assert torch.equal(SimpleRMSNorm(DIM)(x), RMSNorm(DIM, elementwise_affine=False)(x))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    torch.testing.assert_close(SimpleRMSNorm(DIM)(x), DIM**0.5 * x / length, rtol=1e-5, atol=0)


def test_prmsnorm_of_all_features_is_rmsnorm_with_eps_outside() -> None:
    norm = norm_of("prmsnorm", p=1.0, eps=0.05)
    same = norm_of("rmsnorm", eps=0.05, eps_placement="outside")
    x = features(4, DIM)
    assert torch.equal(norm(x), same(x))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_crmsnorm_is_rmsnorm_and_layernorm_of_the_completed_zero_mean_vector(eps: float) -> None:
    z = features(4, DIM)
    completed = torch.cat((z, -z.sum(-1, keepdim=True)), dim=-1)
    compressed = CRMSNorm(DIM, eps=eps)(z)
    for cls in (RMSNorm, LayerNorm):
        whole = cls(DIM + 1, eps=eps, elementwise_affine=False)(completed)
        assert_same(compressed, whole[:, :-1])
        assert_same(-compressed.sum(-1), whole[:, -1])


def test_rmsnorm_output_has_rms_scale_and_layernorm_output_mean_zero() -> None:
    x = 10 * features(4, 64) + 2
    y = RMSNorm(64, scale=0.25).double()(x)
    torch.testing.assert_close(
        y.pow(2).mean(-1).sqrt(), torch.full((4,), 0.25).double(), rtol=1e-6, atol=0
    )
    y = LayerNorm(64).double()(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(4).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_norms_without_affine_parameters_have_none(name: str) -> None:
    norm = operation(name)(DIM, elementwise_affine=False)
    assert not list(norm.parameters())
    x = features(3, DIM)
    torch.testing.assert_close(norm(x), operation(name)(DIM).double()(x))


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_statistics_of_bf16_features_in_bf16_would_be_another_norm(name: str) -> None:
    x = (1.0 + features(2, 4096, seed=3)).bfloat16()
    exact = operation(name)(4096).double()(x.double()).bfloat16()
    assert torch.equal(operation(name)(4096).bfloat16()(x), exact)
    low = x - x.mean(-1, keepdim=True) if name == "layernorm" else x
    low = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert not torch.equal(low, exact)


def test_float16_features_whose_squares_overflow_are_normalized() -> None:
    y = RMSNorm(DIM)(torch.full((1, DIM), 60000.0, dtype=torch.float16))
    assert torch.equal(y, torch.ones(1, DIM, dtype=torch.float16))


def test_cast_says_where_the_product_with_the_weight_is_rounded() -> None:
    x = features(16, 64).bfloat16()
    output, input_ = (RMSNorm(64, cast=cast).bfloat16() for cast in ("output", "input"))
    gemma = RMSNorm(64, unit_offset=True).bfloat16()
    weight = (1 + 0.3 * features(64, seed=5)).bfloat16()
    for norm in (output, input_, gemma):
        norm.weight.data = weight.clone()
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(output(x), (weight.float() * h).bfloat16())  # OLMo 2
    assert torch.equal(input_(x), weight * h.bfloat16())  # Llama
    assert torch.equal(gemma(x), ((1 + weight.float()) * h).bfloat16())
    assert not torch.equal(output(x), input_(x))
    assert torch.equal(output.float()(x.float()), input_.float()(x.float()))


def test_a_prmsnorm_of_a_token_that_is_zero_where_measured_divides_by_eps() -> None:
    x = torch.ones(1, DIM, dtype=torch.float64)
    x[:, : DIM // 4] = 0.0
    norm = operation("prmsnorm")(DIM, p=0.25, eps=0.01).double()
    assert math.isclose(norm(x)[0, -1].item(), 100.0)
