"""Every norm of the table keeps the contract of norms; and the gains."""

from typing import Any

import pytest
import torch
from features import (
    DIM,
    assert_gradients_match_finite_differences,
    assert_same,
    features,
    norm_of,
    shaken,
)

from llmnorm.modeling.gains import Constant, EmbeddingScale, Gain, HeadGain
from llmnorm.modeling.norms import RMSNorm
from llmnorm.modeling.operations import OPERATIONS, list_norms, operation, register_norm
from llmnorm.modeling.residual import NormSpec

pytestmark = pytest.mark.fast

OWN = {
    "bhyt": {"lam": (1, 2.0), "weight": (DIM, 1.0)},
    "crmsnorm": {},
    "derf": {"alpha": (1, 1.0), "shift": (1, 0.0), "weight": (DIM, 1.0), "bias": (DIM, 0.0)},
    "dyt": {"alpha": (1, 1.0), "weight": (DIM, 1.0)},
    "fixnorm": {},
    "l2norm": {},
    "layernorm": {"weight": (DIM, 1.0), "bias": (DIM, 0.0)},
    "none": {},
    "pointwise": {"alpha": (1, 1.0), "shift": (1, 0.0), "weight": (DIM, 1.0), "bias": (DIM, 0.0)},
    "prmsnorm": {"weight": (DIM, 1.0)},
    "rmsnorm": {"weight": (DIM, 1.0)},
    "scalenorm": {"weight": (1, DIM**0.5)},
    "seednorm": {"alpha": (DIM, 1.0), "beta": (DIM, 0.0), "weight": (DIM, 1.0)},
    "simple_rmsnorm": {},
    "tapernorm": {
        "weight": (DIM, 1.0),
        "taper_weight": (DIM, 1.0),
        "gate": (1, 1.0),
        "c": (1, 1.0),
        "mean_over_rms": (1, 0.0),
        "mean_square": (1, 0.0),
    },
}


def test_every_norm_of_the_field_is_registered_and_gains_are_no_norms() -> None:
    assert set(OWN) <= set(list_norms())
    assert not {"constant", "gain", "head_gain", "powernorm", "unified_norm"} & set(list_norms())


@pytest.mark.parametrize("name", OWN)
def test_each_norm_has_the_parameters_of_its_paper_with_their_initial_values(name: str) -> None:
    """Scalars have one element, not zero dimensions, which FSDP2 refuses."""
    found = dict(operation(name)(DIM).named_parameters())
    assert {key: tuple(p.shape) for key, p in found.items()} == {
        key: (size,) for key, (size, _) in OWN[name].items()
    }
    for key, (_, value) in OWN[name].items():
        assert torch.equal(found[key], torch.full_like(found[key], value))


@pytest.mark.parametrize("name", OWN)
def test_reset_parameters_restores_the_initial_values(name: str) -> None:
    options = {"dyt": {"alpha": 0.3, "bias": True}, "derf": {"alpha": 0.3, "shift": 0.1}}
    options |= {"rmsnorm": {"bias": True, "unit_offset": True, "weight_init": 0.4}}
    built, norm = (operation(name)(DIM, **options.get(name, {})) for _ in range(2))
    if OWN[name]:
        shaken(norm).float().reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(norm.parameters(), built.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", [*OWN, "gain", "head_gain", "constant"])
def test_gradients_of_input_and_parameters_match_finite_differences(name: str) -> None:
    options = {"constant": {"value": 1.7}, "head_gain": {"heads": 2}}.get(name, {})
    options |= {"scale": 0.5} if name in OWN else {}
    assert_gradients_match_finite_differences(norm_of(name, **options))


@pytest.mark.parametrize("name", OWN)
def test_norms_act_on_the_last_axis_alone(name: str) -> None:
    x, norm = features(2, 3, DIM), norm_of(name)
    rows = torch.stack([norm(row) for row in x.flatten(0, 1)]).view_as(x)
    assert_same(norm(x), rows)


@pytest.mark.parametrize("name", OWN)
def test_a_token_of_zeros_has_finite_values_and_gradients(name: str) -> None:
    x = torch.zeros(2, DIM, dtype=torch.float64, requires_grad=True)
    norm = norm_of(name)
    y = norm(x)
    moved = [parameter for parameter in norm.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(y.sum(), [x, *moved])
    assert all(torch.isfinite(value).all() for value in (y, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_input_dtype_comes_back_whatever_the_parameters_dtype(
    name: str, dtype: torch.dtype
) -> None:
    options = {"constant": {"value": 2.0}, "head_gain": {"heads": 2}}.get(name, {})
    try:
        module = operation(name)(DIM, **options)
    except TypeError:
        pytest.skip(f"{name} needs options; its own tests give them")
    assert module(features(2, DIM).to(dtype)).dtype == dtype
    assert module.to(dtype)(features(2, DIM).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", OWN)
def test_bf16_features_are_computed_in_float32_and_rounded_once(name: str) -> None:
    """Sums of 4,096 squares in bf16 stall near 256: a bf16 mean square would be far too small."""
    x = (1.0 + features(2, 4096, seed=3)).bfloat16()
    norm = operation(name)(4096).bfloat16()
    exact = operation(name)(4096).bfloat16().float()(x.float())
    assert torch.equal(norm(x), exact.bfloat16())


@pytest.mark.parametrize("name", OWN)
def test_scale_multiplies_the_output_and_leaves_the_parameters_alone(name: str) -> None:
    """A reader that knows only `weight` and `eps` finds an ordinary RMSNorm in the module."""
    x, bare, scaled = features(4, DIM), norm_of(name), norm_of(name, scale=0.3)
    assert_same(scaled(x), 0.3 * bare(x))
    assert all(
        torch.equal(a, b) for a, b in zip(bare.parameters(), scaled.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", OWN)
def test_scale_is_not_rounded_to_the_dtype_of_bf16_weights(name: str) -> None:
    """1/sqrt(3) in bf16 is 0.13 % too large: layer 3 of LNS would be another scheme."""
    x = features(16, 64).bfloat16()
    norm = operation(name)(64, scale=3**-0.5).bfloat16()
    exact = 3**-0.5 * operation(name)(64).bfloat16().float()(x.float())
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", OWN)
def test_constants_are_floats_and_never_enter_the_state_dict(name: str) -> None:
    norm = operation(name)(DIM, scale=0.3)
    assert type(norm.scale) is float
    assert not list(norm.buffers())
    assert not Constant(DIM, value=2).state_dict()
    assert type(Constant(DIM, value=2).value) is float


@pytest.mark.parametrize("name", OWN)
def test_a_norm_over_no_features_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        operation(name)(0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1e-6", None])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("rmsnorm", "eps"),
        ("layernorm", "eps"),
        ("dyt", "alpha"),
        ("prmsnorm", "p"),
        ("l2norm", "groups"),
        ("bhyt", "kappa"),
        ("tapernorm", "taper_steps"),
    ],
)
def test_a_number_that_must_be_above_zero_is(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}.{option} is .* expected a number above 0"):
        operation(name)(DIM, **{option: value})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"op": "rmsnorm", "epsilon": 1e-5}, "rmsnorm has no option 'epsilon'; its options: eps"),
        ({"op": "crmsnorm", "bias": True}, "crmsnorm has no option 'bias'"),
        ({"op": "dyt", "eps": 1e-6}, "dyt has no option 'eps'"),
        ({"op": "layernorm", "bias": 1.0}, "layernorm.bias is 1.0"),
        ({"op": "rmsnorm", "eps": True}, "rmsnorm.eps is True"),
        ({"op": "rmsnorm", "eps": float("inf")}, "expected a finite number"),
        ({"op": "rmsnorm", "cast": "fp32"}, "cast is 'fp32'; expected 'input' or 'output'"),
        ({"op": "rmsnorm", "gain": "none"}, "gain is 'none'; expected 'vector' or 'scalar'"),
        ({"op": "rmsnorm", "eps_placement": "in"}, "expected 'inside' or 'outside'"),
        ({"op": "l2norm", "gain": "both"}, "expected 'none', 'scalar' or 'vector'"),
        ({"op": "l2norm", "length": "d"}, "expected 'one' or 'sqrt_dim'"),
        ({"op": "l2norm", "groups": 3}, "3 groups do not divide a width of 16"),
        ({"op": "l2norm", "weight_init": 2.0}, "there is no weight to start"),
        ({"op": "prmsnorm", "p": 1.5}, "p is 1.5; expected a part of the features, at most 1"),
        ({"op": "pointwise", "function": "sin"}, "function is 'sin'; expected one of arctan"),
        ({"op": "tapernorm", "warmup_steps": 2.5}, "2.5; expected a whole number"),
        ({"op": "tapernorm", "momentum": 1.0}, "momentum is 1.0; expected below 1"),
        ({"op": "constant"}, "constant needs the option 'value'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormSpec.parse(spec).build(DIM)


@pytest.mark.parametrize(
    "asked", [{"gain": "scalar"}, {"unit_offset": True}, {"bias": True}, {"weight_init": 0.5}]
)
def test_options_of_a_weight_that_is_left_out_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rmsnorm\.elementwise_affine is False"):
        operation("rmsnorm")(DIM, elementwise_affine=False, **asked)


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


def test_a_resolved_spec_writes_its_defaults_out() -> None:
    assert NormSpec.parse("rmsnorm").at("attn", 64).to_dict() == {
        "op": "rmsnorm",
        "eps": 1e-6,
        "eps_placement": "inside",
        "elementwise_affine": True,
        "gain": "vector",
        "unit_offset": False,
        "bias": False,
        "weight_init": 1.0,
        "cast": "output",
        "scale": 1.0,
    }


def test_the_norm_called_none_changes_nothing() -> None:
    x = features(2, 3, DIM)
    assert torch.equal(operation("none")(DIM)(x), x)


# --- gains ------------------------------------------------------------------------------------


def test_constant_gain_and_embedding_scale_multiply() -> None:
    x = features(2, 3, DIM)
    assert torch.equal(Constant(DIM, value=2.5)(x), 2.5 * x)
    gain = shaken(Gain(DIM, value=0.5))
    torch.testing.assert_close(gain(x), x * gain.weight[None, None, :])
    assert Gain(DIM, value=0.5).weight.tolist() == [0.5] * DIM
    heads = shaken(HeadGain(DIM, heads=2))
    torch.testing.assert_close(heads(x)[..., 8:], x[..., 8:] * heads.weight[1])
    scale = EmbeddingScale(50.0)
    assert scale.weight.shape == (1,)
    assert torch.equal(scale.double()(x), 50.0 * x)
