"""The two lines of the residual stream, and the specs that fill their slots."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from torch import nn

from llmnorm import LlmNormConfig, build_config, build_model
from llmnorm.modeling.operations import OPERATIONS
from llmnorm.modeling.residual import (
    RESIDUALS,
    NormSpec,
    Residual,
    ResidualSpec,
    build_residual,
    build_slot,
    constant,
    parse_layer,
    register_residual,
)

pytestmark = pytest.mark.fast

DIM = 6
SLOTS = ("entry", "pre", "post", "skip", "out")


def features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)


BLOCK = features(77)  # the block's input, which an ordinary joint does not look at


def branch(x: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """A sublayer that is neither linear nor even, so that no two slots commute with it."""
    return factor * torch.sin(3.0 * x) + x.square()


def gained(*slots: str) -> tuple[Residual, dict[str, torch.Tensor]]:
    """A residual with a random gain per feature in each of `slots`, and those gains."""
    spec = ResidualSpec(**{slot: NormSpec(op="gain", options={}) for slot in slots})
    residual = Residual(spec, DIM).double()
    gains = {}
    for seed, slot in enumerate(slots):
        gains[slot] = features(seed + 10)[0, 0]
        getattr(residual, slot).weight.data = gains[slot].clone()
    return residual, gains


def by_hand(
    x: torch.Tensor,
    gains: dict[str, torch.Tensor],
    factor: float = 1.0,
    read: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
) -> torch.Tensor:
    g = {slot: gains.get(slot, torch.ones(DIM).double()) for slot in SLOTS}
    s = g["entry"] * x
    read, skipped = (s if other is None else other for other in (read, skipped))
    return g["out"] * (g["skip"] * skipped + g["post"] * branch(g["pre"] * read, factor=factor))


@pytest.mark.parametrize("slots", [(), *[(slot,) for slot in SLOTS], *pairwise(SLOTS), SLOTS])
def test_the_stream_follows_the_written_formula_with_a_gain_in_every_slot(
    slots: tuple[str, ...],
) -> None:
    residual, gains = gained(*slots)
    x = features()
    found = residual(x, BLOCK, branch)
    torch.testing.assert_close(found, by_hand(x, gains), **TOLERANCE[torch.float64])


def test_gradients_follow_the_written_formula() -> None:
    residual, gains = gained(*SLOTS)
    x = features().requires_grad_()
    leaves = {slot: gain.clone().requires_grad_() for slot, gain in gains.items()}
    weight = features(5)
    found = torch.autograd.grad(
        (residual(x, BLOCK, branch) * weight).sum(),
        [x, *[getattr(residual, s).weight for s in SLOTS]],
    )
    wanted = torch.autograd.grad(
        (by_hand(x, leaves) * weight).sum(), [x, *[leaves[s] for s in SLOTS]]
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])


def test_the_skip_carries_the_entry_and_not_the_raw_stream() -> None:
    """HybridNorm: the stream itself is normalised, out = N(x) + F(N(x))."""
    residual = Residual(ResidualSpec(entry=NormSpec.parse("rmsnorm")), DIM).double()
    x = features()
    s = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    found = residual(x, BLOCK, branch)
    torch.testing.assert_close(found, s + branch(s), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("skips", ["stream", "block"])
@pytest.mark.parametrize("reads", ["stream", "block"])
def test_the_branch_reads_and_the_skip_carries_the_stream_or_the_blocks_input(
    reads: str, skips: str
) -> None:
    _, gains = gained(*SLOTS)
    slots = {slot: NormSpec(op="gain", options={}) for slot in SLOTS}
    residual = Residual(ResidualSpec(**slots, reads=reads, skips=skips), DIM).double()
    for slot, gain in gains.items():
        getattr(residual, slot).weight.data = gain.clone()
    x = features()
    other = {"stream": None, "block": BLOCK}
    wanted = by_hand(x, gains, read=other[reads], skipped=other[skips])
    torch.testing.assert_close(residual(x, BLOCK, branch), wanted, **TOLERANCE[torch.float64])


def test_arguments_of_the_branch_pass_through() -> None:
    residual, gains = gained("pre")
    x = features()
    torch.testing.assert_close(residual(x, BLOCK, branch, factor=0.3), by_hand(x, gains, 0.3))


def test_empty_slots_are_identities_without_parameters() -> None:
    residual = Residual(ResidualSpec(), DIM)
    assert not list(residual.parameters())
    assert all(type(getattr(residual, slot)) is torch.nn.Identity for slot in SLOTS)
    assert type(build_slot(None, DIM)) is torch.nn.Identity


def test_specs_survive_a_round_trip_through_json() -> None:
    spec = ResidualSpec(
        entry=NormSpec.parse("rmsnorm"),
        pre=NormSpec.parse({"op": "layernorm", "eps": 1e-5, "bias": False}),
        q=NormSpec.parse({"op": "rmsnorm", "per_head": True}),
        inner=NormSpec.parse({"op": "head_gain", "heads": 2}),
        skip=constant(1.5),
        out=NormSpec.parse({"op": "dyt", "alpha": 0.5}).scaled(0.5),
    )
    again = ResidualSpec.parse(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert set(spec.to_dict()) == {"entry", "pre", "q", "inner", "skip", "out"}
    assert spec.to_dict()["out"] == {"op": "dyt", "alpha": 0.5, "scale": 0.5}
    assert spec.to_dict()["q"] == {"op": "rmsnorm", "per_head": True}


def test_an_unknown_slot_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no slot is called 'before'; slots: entry, pre, q, k, v"):
        ResidualSpec.parse({"before": "rmsnorm"})


def test_an_unknown_operation_is_refused_when_the_spec_is_read() -> None:
    with pytest.raises(ValueError, match="unknown norm 'rmsnrom'; did you mean 'rmsnorm'"):
        ResidualSpec.parse({"pre": "rmsnrom"})
    with pytest.raises(ValueError, match="a norm needs `op`"):
        ResidualSpec.parse({"pre": {"name": "rmsnorm"}})
    with pytest.raises(ValueError, match="per_head is 'yes'"):
        NormSpec.parse({"op": "rmsnorm", "per_head": "yes"})


def test_words_survive_a_round_trip_and_their_defaults_are_left_out() -> None:
    spec = ResidualSpec(reads="block", skips="block", module="lerp")
    assert spec.to_dict() == {"reads": "block", "skips": "block", "module": "lerp"}
    assert ResidualSpec.parse(spec.to_dict()) == spec
    assert ResidualSpec().to_dict() == {}
    shared = NormSpec.parse({"op": "gain", "shared": True})
    assert NormSpec.parse(shared.to_dict()) == shared


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reads": "input"}, "reads is 'input'; expected stream or block"),
        ({"skips": None}, "skips is None; expected stream or block"),
        ({"module": "residul"}, "unknown residual module 'residul'; known: bhyt, lerp, residual"),
        ({"gate": {"op": "gain", "shared": True}}, "slot gate cannot be shared"),
        ({"q_rotated": {"op": "rmsnorm", "per_head": True}}, "per_head is for slots q, k and v"),
        ({"pre": {"op": "gain", "shared": "yes"}}, "shared is 'yes'; expected true or false"),
    ],
)
def test_words_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualSpec.parse(given)


GAIN = {"op": "gain"}


@pytest.mark.parametrize(
    ("attn", "mlp", "message"),
    [
        ({}, {"k_rotated": GAIN}, "slot k_rotated is attention's; an mlp has none"),
        ({"gate": GAIN}, {}, "slot gate is the mlp's; attention has none"),
        ({"up": GAIN}, {}, "slot up is the mlp's"),
        ({"post": {"op": "gain", "shared": True}}, {}, "attention's slot post is shared"),
        ({}, {"post": {"op": "gain", "shared": True}}, "attention's holds another norm"),
        ({"pre": GAIN}, {"post": {"op": "gain", "shared": True}}, "attention's holds another"),
        ({"post": GAIN}, {"post": {"op": "rmsnorm", "shared": True}}, "holds another norm"),
    ],
)
def test_a_layer_whose_sublayers_do_not_fit_is_refused(
    attn: dict[str, Any], mlp: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layer({"attn": attn, "mlp": mlp})


# --- joints that are more than slots ----------------------------------------------------------


def filled(module: str, *slots: str) -> tuple[Residual, list[torch.Tensor]]:
    """A residual of a kind with a random gain in each slot, and those gains."""
    spec = ResidualSpec(module=module, **dict.fromkeys(slots, NormSpec.parse("gain")))
    residual = build_residual(spec, DIM).double()
    gains = [features(seed + 10)[0, 0] for seed in range(len(slots))]
    for slot, gain in zip(slots, gains, strict=True):
        getattr(residual, slot).weight.data = gain.clone()
    return residual, gains


def test_lerp_steps_from_the_stream_towards_the_branch() -> None:
    residual, (entry, pre, post, first, out) = filled(
        "lerp", "entry", "pre", "post", "first", "out"
    )
    x = features()
    s = entry * x
    wanted = out * (s + first * (post * branch(pre * s) - s))
    torch.testing.assert_close(residual(x, BLOCK, branch), wanted, **TOLERANCE[torch.float64])


def test_residual_dual_adds_the_branch_to_both_streams() -> None:
    residual, (pre, skip, post, out, second) = filled(
        "residual_dual", "pre", "skip", "post", "out", "second"
    )
    p, r = features(1), features(2)
    f = branch(pre * p)
    wanted = torch.stack((out * (skip * p + post * f), r + second * f))
    found = residual(torch.stack((p, r)), BLOCK, branch)
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])


def test_siamese_reads_both_streams_and_normalizes_one() -> None:
    residual, (entry, first, second, pre, skip, post, out) = filled(
        "siamese", "entry", "first", "second", "pre", "skip", "post", "out"
    )
    p, r = features(1), features(2)
    s = entry * p
    f = branch(pre * (first * s + second * r))
    wanted = torch.stack((out * (skip * s + post * f), r + f))
    found = residual(torch.stack((p, r)), BLOCK, branch)
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])


def test_a_residual_module_is_registered_under_one_name_once() -> None:
    with pytest.raises(ValueError, match="'lerp' is already registered by Lerp"):
        register_residual("lerp")(type("Other", (Residual,), {}))
    assert RESIDUALS["residual"] is Residual


def test_scaling_twice_multiplies_and_leaves_the_first_spec_alone() -> None:
    spec = NormSpec.parse({"op": "rmsnorm", "scale": 3.0})
    assert spec.scaled(0.5).scaled(0.5).options["scale"] == 0.75
    assert spec.options == {"scale": 3.0}
    assert spec.scaled(0.5).build(DIM).scale == 1.5


def test_every_registered_operation_can_fill_a_slot() -> None:
    options = {"constant": {"value": 0.5}, "head_gain": {"heads": 2}}
    options["profiled_gain"] = {"value": 0.5}  # unmeasured, it is NaN
    for name in OPERATIONS:
        spec = NormSpec(op=name, options=options.get(name, {}))
        residual = Residual(ResidualSpec(post=spec), DIM).double()
        x = features()
        torch.testing.assert_close(residual(x, BLOCK, branch), x + residual.post(branch(x)))


@pytest.mark.fast
def test_a_shared_slot_follows_what_attention_holds_later() -> None:
    """Adapters and fused kernels replace modules in a built model."""
    model = build_model(build_config(SHAPE, placement="gpas"))
    layer = model.model.layers[1]
    layer.attn_residual.out = nn.Identity()
    assert layer.mlp_residual.out.module is layer.attn_residual.out


@pytest.mark.fast
def test_a_plain_mlp_has_no_slot_gate() -> None:
    config = build_config(SHAPE, placement="sdd", mlp="plain")
    assert all("gate" not in layer["mlp"] and "up" in layer["mlp"] for layer in config.residuals)
    residuals = [{"attn": {}, "mlp": {"gate": {"op": "rmsnorm"}}}] * SHAPE["num_hidden_layers"]
    hand_made = {"placement": None, "norm": None, "residuals": residuals}
    with pytest.raises(ValueError, match="slot gate is a gated mlp's; mlp is 'plain'"):
        LlmNormConfig(**SHAPE, **hand_made, mlp="plain").residual_specs()
