"""GPAS: a learned shrinking of the stream that its gradient does not see (Chen et al. 2025)."""

import math
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch.nn.functional import silu
from wiring import Function, assert_follows, attention, mlp, model_of, norm_names, rms

from llmnorm import build_config, build_model, list_placements, self_test
from llmnorm.errors import ConfigError
from llmnorm.modeling.gains import GPASGate
from llmnorm.modeling.residual import Shared
from llmnorm.placements import PLACEMENTS

pytestmark = pytest.mark.fast


def over(base: Any) -> dict[str, Any]:
    return {"name": "gpas", "base": base}


def norm_for(base: str) -> str:
    """A norm that the placement is defined for."""
    return (PLACEMENTS[base].accepts or ("rmsnorm",))[0]


def shrunk(module: torch.nn.Module, scale: float = 1.0) -> Function:
    """scale * (1 - silu(gate)) * x: the value, whatever the gradient."""
    return lambda x: scale * (1 - silu(module.gate)) * x


# --- the gate ---------------------------------------------------------------------------------


def gate_at(value: float, scale: float = 1.0) -> GPASGate:
    gate = GPASGate(6, scale=scale).double()
    gate.gate.data.fill_(value)
    return gate


def features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("value", [-2.0, 0.0, 0.3, 1.0, 3.0])
def test_the_gate_scales_the_value_and_leaves_the_gradient(value: float, scale: float) -> None:
    """Finite differences of the value give 1 - silu(a); autograd gives 1."""
    gate, x, dy, step = gate_at(value, scale), features().requires_grad_(), features(1), 1e-6
    sigmoid = 1 / (1 + math.exp(-value))
    factor = scale * (1 - value * sigmoid)
    torch.testing.assert_close(gate(x), factor * x, **TOLERANCE[torch.float64])
    moved = (gate(x + step * dy) - gate(x - step * dy)) / (2 * step)
    torch.testing.assert_close(moved, factor * dy, rtol=1e-6, atol=1e-8)
    dx, da = torch.autograd.grad(gate(x), [x, gate.gate], dy)
    assert torch.equal(dx, scale * dy)
    slope = sigmoid * (1 + value * (1 - sigmoid))
    torch.testing.assert_close(da, -scale * slope * (dy * x).sum()[None])


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.7])
def test_the_gates_own_gradient_is_that_of_finite_differences(value: float) -> None:
    gate, x = gate_at(value, 1.3), features()
    assert torch.autograd.gradcheck(
        lambda a: torch.func.functional_call(gate, {"gate": a}, (x,)), gate.gate
    )


def test_the_factor_is_negative_beyond_a_gate_of_1_278() -> None:
    x = torch.ones(1, 6, dtype=torch.float64)
    assert (gate_at(1.278)(x) > 0).all()
    assert (gate_at(1.279)(x) < 0).all()


def test_the_gate_keeps_the_dtype_of_the_stream() -> None:
    assert GPASGate(6)(features().bfloat16()).dtype == torch.bfloat16


# --- where it stands --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
def test_over_pre_ln_the_gate_acts_on_the_sum(depth: int) -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        x = shrunk(attn.out)(x + attention(layer)(rms(attn.pre)(x)))
        return shrunk(attn.out)(x + mlp(layer)(rms(feed.pre)(x)))

    assert_follows(model_of("gpas", depth=depth), block)


def test_over_lns_the_factor_of_the_norms_stays() -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        x = shrunk(attn.out)(x + attention(layer)(rms(attn.pre)(x) * number**-0.5))
        return shrunk(attn.out)(x + mlp(layer)(rms(feed.pre)(x) * number**-0.5))

    assert_follows(model_of(over("lns")), block)


def test_over_sandwich_ln_the_gate_acts_on_the_sum() -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        x = shrunk(attn.out)(x + rms(attn.post)(attention(layer)(rms(attn.pre)(x))))
        return shrunk(attn.out)(x + rms(feed.post)(mlp(layer)(rms(feed.pre)(x))))

    assert_follows(model_of(over("sandwich_ln")), block)


@pytest.mark.parametrize("depth", [1, 4])
def test_over_deepnorm_the_gate_acts_on_the_skip_alone(depth: int) -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        skip = shrunk(attn.skip, (2 * depth) ** 0.25)
        x = rms(attn.out)(skip(x) + attention(layer)(x))
        return rms(feed.out)(skip(x) + mlp(layer)(x))

    assert_follows(model_of(over("deepnorm"), depth=depth), block, final=False)


def test_over_mix_ln_each_layer_has_the_gate_of_its_kind() -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        if number <= 2:
            x = rms(attn.out)(shrunk(attn.skip)(x) + attention(layer)(x))
            return rms(feed.out)(shrunk(attn.skip)(x) + mlp(layer)(x))
        x = shrunk(attn.out)(x + attention(layer)(rms(attn.pre)(x)))
        return shrunk(attn.out)(x + mlp(layer)(rms(feed.pre)(x)))

    assert_follows(model_of(over({"name": "mix_ln", "fraction": 0.5})), block)


def test_one_gate_a_layer_serves_both_sublayers() -> None:
    model = build_model(build_config(SHAPE, placement="gpas"))
    gates = norm_names(model) - norm_names(model_of("pre_ln"))
    assert gates == {f"layers.{i}.attn_residual.out.gate" for i in range(4)}
    for layer in model.model.layers:
        assert layer.attn_residual.out.gate.tolist() == [0.0]
        assert isinstance(layer.mlp_residual.out, Shared)
        assert layer.mlp_residual.out.module is layer.attn_residual.out


# --- what it is at its start ------------------------------------------------------------------


@pytest.mark.parametrize("base", ["pre_ln", "deepnorm", "mix_ln", "sandwich_ln", "post_ln"])
def test_at_a_gate_of_0_gpas_is_its_base_bit_for_bit(base: str) -> None:
    """Gradients too, but for the order in which those of skip and branch are added."""
    gated = build_model(build_config(SHAPE, placement=over(base)), seed=4).double()
    plain = build_model(build_config(SHAPE, placement=base), seed=4).double()
    outputs = [model(tokens(), labels=tokens()) for model in (gated, plain)]
    assert torch.equal(*(output.logits for output in outputs))
    for output in outputs:
        output.loss.backward()
    found = dict(gated.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter)
        torch.testing.assert_close(found[name].grad, parameter.grad, **TOLERANCE[torch.float64])


def test_the_gate_shrinks_the_stream_but_not_the_gradient_that_passes_it() -> None:
    """Branches of 0: the stream shrinks by c a sublayer, its gradient stays 1."""
    model = build_model(build_config(SHAPE, placement="gpas")).double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.attn_residual.out.gate.fill_(0.5)
    x = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    y = model.model(inputs_embeds=x, output_hidden_states=True).hidden_states[3]
    factor = 1 - silu(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(y, x * factor**6)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy)


# --- its base ---------------------------------------------------------------------------------


def test_init_embedding_and_final_norm_are_the_bases() -> None:
    assert build_config("debug", placement=over("deepnorm")).init == "deepnorm"
    assert build_config("debug", placement=over("deepnorm")).final_norm is None
    assert build_config("debug", placement=over("peri_ln")).embedding == "norm"
    assert build_config("debug", placement="gpas").final_norm is not None
    scaled = [build_config("debug", placement=p) for p in ("completep", over("completep"))]
    assert scaled[0].parametrization == scaled[1].parametrization != "standard"


# Joints other than the slots, and layers whose sublayers are joined in different ways.
UNFIT = ("keel", "post_pre", "pre_post", "residual_dual", "siamese_norm", "ngpt", "admin", "bhyt")


@pytest.mark.parametrize("base", [n for n in list_placements() if n not in (*UNFIT, "gpas")])
def test_any_placement_of_one_stream_can_be_the_base(base: str) -> None:
    model = build_model(build_config(SHAPE, placement=over(base), norm=norm_for(base)))
    self_test(model, fresh=True)
    model(tokens(), labels=tokens()).loss.backward()
    for layer in model.model.layers:
        gates = [g for g in layer.attn_residual.children() if isinstance(g, GPASGate)]
        assert len(gates) == 1
        assert torch.isfinite(gates[0].gate.grad).all()


@pytest.mark.parametrize("base", [n for n in list_placements() if n in UNFIT])
def test_a_base_that_leaves_no_place_for_a_shared_gate_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=rf"gpas\.base is {base}, whose sublayers in layer"):
        build_config(SHAPE, placement=over(base), norm=norm_for(base))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("gpas", r"gpas\.base is gpas; expected another placement"),
        ({"name": "gpas", "base": "post_ln"}, r"gpas\.base is gpas; expected another placement"),
        ("pre", "unknown placement 'pre'; did you mean 'pre_ln'"),
        ({"name": "mix_ln", "fraktion": 0.5}, "mix_ln has no option 'fraktion'"),
        (3, "placement is 3; expected a name"),
        (None, "placement is None; expected a name"),
    ],
)
def test_a_base_that_is_no_other_placement_is_refused(base: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SHAPE, placement=over(base))


def test_the_base_with_its_options_is_stored() -> None:
    placement = over({"name": "mix_ln", "fraction": 0.5})
    assert build_config(SHAPE, placement=placement).placement == placement
