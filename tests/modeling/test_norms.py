"""The norms and gains against their formulas, written out here by hand."""

import math

import pytest
import torch
from schemes import TOLERANCE

from llmnorm.modeling.gains import Constant, EmbeddingScale, Gain, HeadGain
from llmnorm.modeling.norms import Derf, DyT, LayerNorm, RMSNorm, alpha_at
from llmnorm.modeling.operations import OPERATIONS, list_norms, operation, register_norm
from llmnorm.modeling.residual import NormSpec

pytestmark = pytest.mark.fast

DIM = 6


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 features."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shaken(norm: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """The norm in float64 with every parameter moved off its initial value."""
    norm.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return norm


def rmsnorm_by_hand(x: torch.Tensor, p: dict, *, eps: float, scale: float) -> torch.Tensor:
    rows = [row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + eps) for row in x]
    return scale * torch.stack(rows) * p["weight"]


def layernorm_by_hand(x: torch.Tensor, p: dict, *, eps: float, scale: float) -> torch.Tensor:
    rows = []
    for row in x:
        mean = sum(row.tolist()) / len(row)
        variance = sum((v - mean) ** 2 for v in row.tolist()) / len(row)  # biased
        rows.append((row - mean) / math.sqrt(variance + eps))
    return scale * (torch.stack(rows) * p["weight"] + p.get("bias", 0.0))


def dyt_by_hand(x: torch.Tensor, p: dict, *, scale: float) -> torch.Tensor:
    alpha = p["alpha"].item()
    squashed = torch.tensor(
        [[math.tanh(alpha * v) for v in row] for row in x.tolist()], dtype=x.dtype
    )
    return scale * (squashed * p["weight"] + p.get("bias", 0.0))


def derf_by_hand(x: torch.Tensor, p: dict, *, scale: float) -> torch.Tensor:
    alpha, shift = p["alpha"].item(), p["shift"].item()
    squashed = torch.tensor(
        [[math.erf(alpha * v + shift) for v in row] for row in x.tolist()], dtype=x.dtype
    )
    return scale * (squashed * p["weight"] + p.get("bias", 0.0))


def parameters(norm: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in norm.named_parameters()}


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_divides_by_the_root_mean_square_with_eps_inside(eps: float, scale: float) -> None:
    norm = shaken(RMSNorm(DIM, eps=eps, scale=scale))
    x = features(4, DIM)
    wanted = rmsnorm_by_hand(x, parameters(norm), eps=eps, scale=scale)
    torch.testing.assert_close(norm(x), wanted, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_layernorm_uses_the_biased_variance_and_scales_the_bias_too(eps: float, bias: bool) -> None:
    norm = shaken(LayerNorm(DIM, eps=eps, bias=bias, scale=0.7))
    x = features(4, DIM)
    assert set(parameters(norm)) == ({"weight", "bias"} if bias else {"weight"})
    wanted = layernorm_by_hand(x, parameters(norm), eps=eps, scale=0.7)
    torch.testing.assert_close(norm(x), wanted, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("bias", [True, False])
def test_dyt_is_the_weighted_tanh_of_alpha_x(bias: bool) -> None:
    norm = shaken(DyT(DIM, alpha=0.8, bias=bias, scale=0.7))
    x = features(4, DIM)
    assert set(parameters(norm)) == {"alpha", "weight"} | ({"bias"} if bias else set())
    wanted = dyt_by_hand(x, parameters(norm), scale=0.7)
    torch.testing.assert_close(norm(x), wanted, **TOLERANCE[torch.float64])
    x.requires_grad_()
    (slope,) = torch.autograd.grad(norm(x).sum(), x)
    p = parameters(norm)
    by_hand = 0.7 * p["weight"] * p["alpha"] * (1 - torch.tanh(p["alpha"] * x.detach()) ** 2)
    torch.testing.assert_close(slope, by_hand, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("bias", [True, False])
def test_derf_is_the_weighted_erf_of_alpha_x_plus_shift(bias: bool) -> None:
    norm = shaken(Derf(DIM, alpha=0.8, shift=0.2, bias=bias, scale=0.7))
    x = features(4, DIM)
    wanted = derf_by_hand(x, parameters(norm), scale=0.7)
    torch.testing.assert_close(norm(x), wanted, **TOLERANCE[torch.float64])
    x.requires_grad_()
    slope, slope_shift = torch.autograd.grad(norm(x).sum(), [x, norm.shift])
    p = parameters(norm)
    u = p["alpha"] * x.detach() + p["shift"]
    density = 0.7 * p["weight"] * (2 / math.sqrt(math.pi)) * torch.exp(-u * u)
    torch.testing.assert_close(slope, p["alpha"] * density, **TOLERANCE[torch.float64])
    torch.testing.assert_close(slope_shift, density.sum()[None], **TOLERANCE[torch.float64])


def test_rmsnorm_gradient_is_the_projection_off_its_own_output() -> None:
    """d/dx of g . x/rms(x): (g - xhat * mean(g * xhat)) / rms, with eps in the root."""
    norm = shaken(RMSNorm(DIM, eps=0.05, scale=0.5))
    x, g = features(3, DIM).requires_grad_(), features(3, DIM, seed=1)
    (found,) = torch.autograd.grad((norm(x) * g).sum(), x)
    rms = torch.sqrt(x.detach().pow(2).mean(-1, keepdim=True) + 0.05)
    unit, pulled = x.detach() / rms, 0.5 * g * parameters(norm)["weight"]
    by_hand = (pulled - unit * (pulled * unit).mean(-1, keepdim=True)) / rms
    torch.testing.assert_close(found, by_hand, **TOLERANCE[torch.float64])


def test_layernorm_gradient_is_also_free_of_the_mean() -> None:
    norm = shaken(LayerNorm(DIM, eps=0.05))
    x, g = features(3, DIM).requires_grad_(), features(3, DIM, seed=1)
    (found,) = torch.autograd.grad((norm(x) * g).sum(), x)
    centred = x.detach() - x.detach().mean(-1, keepdim=True)
    std = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 0.05)
    unit, pulled = centred / std, g * parameters(norm)["weight"]
    by_hand = (
        pulled - pulled.mean(-1, keepdim=True) - unit * (pulled * unit).mean(-1, keepdim=True)
    ) / std
    torch.testing.assert_close(found, by_hand, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm(DIM, scale=0.5),
        RMSNorm(DIM, elementwise_affine=False),
        RMSNorm(DIM, cast="input"),
        LayerNorm(DIM, scale=0.5),
        LayerNorm(DIM, bias=False),
        DyT(DIM, bias=True, scale=0.5),
        Derf(DIM, shift=0.1, scale=0.5),
        Gain(DIM, value=0.5),
        HeadGain(DIM, heads=2),
        Constant(DIM, value=1.7),
    ],
    ids=lambda norm: f"{type(norm).__name__}-{norm.__dict__.get('scale', '')}",
)
def test_gradients_of_input_and_parameters_match_finite_differences(norm: torch.nn.Module) -> None:
    shaken(norm)
    names, values = zip(*norm.named_parameters(), strict=True) if parameters(norm) else ((), ())
    x = features(2, 3, DIM).requires_grad_()

    def call(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        call, (x, *(v.detach().clone().requires_grad_() for v in values))
    )


# --- invariances ------------------------------------------------------------------------------


def test_rmsnorm_is_scale_free_up_to_eps_and_not_below_it() -> None:
    norm = shaken(RMSNorm(DIM, eps=1e-12))
    x = features(4, DIM)
    torch.testing.assert_close(norm(37.0 * x), norm(x), **TOLERANCE[torch.float64])
    assert not torch.allclose(norm(x + 1.0), norm(x))  # the mean is kept
    tiny = RMSNorm(DIM, eps=1e-6).double()(1e-6 * x)  # RMS far below sqrt(eps): not normalized up
    assert tiny.abs().max() < 1e-2


def test_layernorm_is_shift_free_and_scale_free() -> None:
    norm = shaken(LayerNorm(DIM, eps=1e-12))
    x = features(4, DIM)
    torch.testing.assert_close(norm(5.0 * x + 3.0), norm(x), **TOLERANCE[torch.float64])


def test_rmsnorm_output_has_rms_scale_and_layernorm_output_mean_zero() -> None:
    x = 10 * features(4, 64) + 2
    y = RMSNorm(64, scale=0.25).double()(x)
    torch.testing.assert_close(
        y.pow(2).mean(-1).sqrt(), torch.full((4,), 0.25).double(), rtol=1e-6, atol=0
    )
    y = LayerNorm(64).double()(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(4).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", [DyT, Derf])
def test_dyt_and_derf_are_bounded_by_their_weight_and_act_on_each_element_alone(cls: type) -> None:
    norm = cls(DIM, bias=False).double()
    x = 1e6 * features(4, DIM)
    assert norm(x).abs().max() <= 1.0
    torch.testing.assert_close(norm(x).abs(), torch.ones_like(x))
    moved = features(1, DIM).clone()
    before = norm(moved)
    moved[0, 0] += 1.0
    assert torch.equal(norm(moved)[0, 1:], before[0, 1:])


def test_norms_act_on_the_last_axis_alone() -> None:
    x = features(2, 3, DIM)
    for name in list_norms():
        norm = operation(name)(DIM).double()
        rows = torch.stack([norm(row) for row in x.flatten(0, 1)]).view_as(x)
        torch.testing.assert_close(norm(x), rows, **TOLERANCE[torch.float64])


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_input_dtype_comes_back_whatever_the_parameters_dtype(
    name: str, dtype: torch.dtype
) -> None:
    options = {"constant": {"value": 2.0}, "head_gain": {"heads": 2}}.get(name, {})
    module = operation(name)(DIM, **options)
    assert module(features(2, DIM).to(dtype)).dtype == dtype
    assert module.to(dtype)(features(2, DIM).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_statistics_of_bf16_features_are_taken_in_float32(name: str) -> None:
    """Sums of 4,096 squares in bf16 stall near 256: a bf16 mean square would be far too small."""
    x = (1.0 + features(2, 4096, seed=3)).bfloat16()
    norm = operation(name)(4096).bfloat16()
    exact = operation(name)(4096).double()(x.double())
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=0, atol=0)
    low = x - x.mean(-1, keepdim=True) if name == "layernorm" else x
    low = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert not torch.equal(low, exact.bfloat16())  # so the equality above could have failed


@pytest.mark.parametrize("cls", [DyT, Derf])
def test_bf16_alpha_and_features_multiply_in_float32(cls: type) -> None:
    x = (3.3 * features(64, DIM)).bfloat16()
    norm = cls(DIM, alpha=0.37).bfloat16()
    squash = torch.tanh if cls is DyT else torch.erf
    exact = squash(norm.alpha.double() * x.double()).bfloat16()
    assert torch.equal(norm(x), exact)
    assert not torch.equal(squash(norm.alpha * x), exact)


def test_float16_features_whose_squares_overflow_are_normalized() -> None:
    y = RMSNorm(DIM)(torch.full((1, DIM), 60000.0, dtype=torch.float16))
    assert torch.equal(y, torch.ones(1, DIM, dtype=torch.float16))


def test_cast_says_where_the_product_with_the_weight_is_rounded() -> None:
    x = features(16, 64).bfloat16()
    output, input_ = (RMSNorm(64, cast=cast).bfloat16() for cast in ("output", "input"))
    weight = (1 + 0.3 * features(64, seed=5)).bfloat16()
    for norm in (output, input_):
        norm.weight.data = weight.clone()
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(output(x), (weight.float() * h).bfloat16())  # OLMo 2
    assert torch.equal(input_(x), weight * h.bfloat16())  # Llama
    assert not torch.equal(output(x), input_(x))
    assert torch.equal(output.float()(x.float()), input_.float()(x.float()))


def test_scale_multiplies_the_output_and_leaves_the_weight_alone() -> None:
    """A reader that knows only `weight` and `eps` finds an ordinary RMSNorm in the module."""
    x = features(4, DIM)
    for name in list_norms():
        bare = shaken(operation(name)(DIM), seed=2)
        scaled = shaken(operation(name)(DIM, scale=0.3), seed=2)
        torch.testing.assert_close(scaled(x), 0.3 * bare(x), **TOLERANCE[torch.float64])
        assert torch.equal(scaled.weight, bare.weight)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "dyt", "derf"])
def test_scale_is_not_rounded_to_the_dtype_of_bf16_weights(name: str) -> None:
    """1/sqrt(3) in bf16 is 0.13 % too large: layer 3 of LNS would be another scheme."""
    x = features(16, 64).bfloat16()
    norm = operation(name)(64, scale=3**-0.5).bfloat16()
    exact = 3**-0.5 * operation(name)(64).float()(x.float())
    assert torch.equal(norm(x), exact.bfloat16())


def test_constants_are_floats_and_never_enter_the_state_dict() -> None:
    for name in list_norms():
        norm = operation(name)(DIM, scale=0.3)
        assert type(norm.scale) is float
        assert not list(norm.buffers())
    assert not Constant(DIM, value=2).state_dict()
    assert type(Constant(DIM, value=2).value) is float


# --- parameters and options -------------------------------------------------------------------


def test_alpha_and_shift_have_one_element_not_zero_dimensions() -> None:
    assert DyT(DIM).alpha.shape == (1,)
    assert Derf(DIM).alpha.shape == (1,)
    assert Derf(DIM).shift.shape == (1,)


def test_each_norm_has_the_parameters_of_its_paper_by_default() -> None:
    shapes = {
        name: {k: tuple(p.shape) for k, p in operation(name)(DIM).named_parameters()}
        for name in ("rmsnorm", "layernorm", "dyt", "derf")
    }
    assert shapes == {
        "rmsnorm": {"weight": (DIM,)},
        "layernorm": {"weight": (DIM,), "bias": (DIM,)},
        "dyt": {"alpha": (1,), "weight": (DIM,)},
        "derf": {"alpha": (1,), "shift": (1,), "weight": (DIM,), "bias": (DIM,)},
    }


def test_norms_without_affine_parameters_have_none() -> None:
    for name in ("rmsnorm", "layernorm"):
        norm = operation(name)(DIM, elementwise_affine=False)
        assert not list(norm.parameters())
        x = features(3, DIM)
        torch.testing.assert_close(norm(x), operation(name)(DIM).double()(x))


def test_default_eps_is_1e_6_and_initial_values_are_the_formulas_identity() -> None:
    assert RMSNorm(DIM).eps == LayerNorm(DIM).eps == 1e-6
    for name in list_norms():
        for key, parameter in operation(name)(DIM).named_parameters():
            assert set(parameter.tolist()) == {{"bias": 0.0, "shift": 0.0}.get(key, 1.0)}


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "dyt", "derf"])
def test_reset_parameters_restores_the_initial_values(name: str) -> None:
    options = {"dyt": {"alpha": 0.3, "bias": True}, "derf": {"alpha": 0.3, "shift": 0.1}}
    built = operation(name)(DIM, **options.get(name, {}))
    norm = operation(name)(DIM, **options.get(name, {}))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(9.0)
    norm.reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(norm.parameters(), built.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "dyt", "derf"])
def test_a_norm_over_no_features_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        operation(name)(0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1e-6", None])
@pytest.mark.parametrize(
    ("name", "option"), [("rmsnorm", "eps"), ("layernorm", "eps"), ("dyt", "alpha")]
)
def test_eps_and_alpha_must_be_numbers_above_zero(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}.{option} is .* expected a number above 0"):
        operation(name)(DIM, **{option: value})


def test_an_unknown_cast_is_refused() -> None:
    with pytest.raises(ValueError, match="'input' or 'output'"):
        RMSNorm(DIM, cast="fp32")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"op": "rmsnorm", "epsilon": 1e-5}, "rmsnorm has no option 'epsilon'; its options: eps"),
        ({"op": "rmsnorm", "bias": True}, "rmsnorm has no option 'bias'"),
        ({"op": "dyt", "eps": 1e-6}, "dyt has no option 'eps'"),
        ({"op": "layernorm", "bias": 1.0}, "layernorm.bias is 1.0"),
        ({"op": "rmsnorm", "eps": True}, "rmsnorm.eps is True"),
        ({"op": "rmsnorm", "eps": float("inf")}, "expected a finite number"),
        ({"op": "constant"}, "constant needs the option 'value'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormSpec.parse(spec).build(DIM)


def test_an_unknown_norm_raises_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown norm 'rmsnrom'; did you mean 'rmsnorm'"):
        operation("rmsnrom")


def test_a_name_cannot_be_registered_twice() -> None:
    class Other(torch.nn.Module):
        """Another class."""

    with pytest.raises(ValueError, match="'rmsnorm' is already registered by RMSNorm"):
        register_norm("rmsnorm")(Other)
    assert operation("rmsnorm") is RMSNorm
    assert list_norms().count("rmsnorm") == 1


def test_the_four_norms_are_registered_and_gains_are_no_norms() -> None:
    assert set(list_norms()) >= {"layernorm", "rmsnorm", "dyt", "derf"}
    assert not {"constant", "gain", "head_gain"} & set(list_norms())


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


@pytest.mark.parametrize("name", ["dyt", "derf"])
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


def test_a_resolved_spec_writes_its_defaults_out() -> None:
    assert NormSpec.parse("rmsnorm").at("attn", 64).to_dict() == {
        "op": "rmsnorm",
        "eps": 1e-6,
        "elementwise_affine": True,
        "cast": "output",
        "scale": 1.0,
    }


# --- gains ------------------------------------------------------------------------------------


def test_constant_gain_and_embedding_scale_multiply() -> None:
    x = features(2, 3, DIM)
    assert torch.equal(Constant(DIM, value=2.5)(x), 2.5 * x)
    gain = shaken(Gain(DIM, value=0.5))
    torch.testing.assert_close(gain(x), x * gain.weight[None, None, :])
    assert Gain(DIM, value=0.5).weight.tolist() == [0.5] * DIM
    scale = EmbeddingScale(50.0)
    assert scale.weight.shape == (1,)
    assert torch.equal(scale.double()(x), 50.0 * x)


def test_head_gain_multiplies_whole_heads() -> None:
    gain = HeadGain(DIM, heads=3).double()
    gain.weight.data = torch.tensor([1.0, 2.0, 3.0]).double()
    y = gain(torch.ones(2, DIM).double())
    assert y.tolist() == [[1, 1, 2, 2, 3, 3]] * 2
    assert HeadGain(DIM, heads=3, value=0.5).weight.tolist() == [0.5] * 3


@pytest.mark.parametrize("heads", [0, 4])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match="do not divide a width of 6"):
        HeadGain(DIM, heads=heads)


def test_gains_reset_to_their_initial_value() -> None:
    for gain in (Gain(DIM, value=0.5), HeadGain(DIM, heads=2, value=0.5), EmbeddingScale(0.5)):
        gain.weight.data.fill_(9.0)
        gain.reset_parameters()
        assert set(gain.weight.tolist()) == {0.5}
