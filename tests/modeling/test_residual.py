"""The two lines of the residual stream, and the specs that fill their slots."""

import json
from itertools import pairwise

import pytest
import torch
from schemes import TOLERANCE

from llmnorm.modeling.operations import OPERATIONS
from llmnorm.modeling.residual import NormSpec, Residual, ResidualSpec, build_slot, constant

pytestmark = pytest.mark.fast

DIM = 6
SLOTS = ("entry", "pre", "post", "skip", "out")


def features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)


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


def by_hand(x: torch.Tensor, gains: dict[str, torch.Tensor], factor: float = 1.0) -> torch.Tensor:
    g = {slot: gains.get(slot, torch.ones(DIM).double()) for slot in SLOTS}
    s = g["entry"] * x
    return g["out"] * (g["skip"] * s + g["post"] * branch(g["pre"] * s, factor=factor))


@pytest.mark.parametrize("slots", [(), *[(slot,) for slot in SLOTS], *pairwise(SLOTS), SLOTS])
def test_the_stream_follows_the_written_formula_with_a_gain_in_every_slot(
    slots: tuple[str, ...],
) -> None:
    residual, gains = gained(*slots)
    x = features()
    torch.testing.assert_close(residual(x, branch), by_hand(x, gains), **TOLERANCE[torch.float64])


def test_gradients_follow_the_written_formula() -> None:
    residual, gains = gained(*SLOTS)
    x = features().requires_grad_()
    leaves = {slot: gain.clone().requires_grad_() for slot, gain in gains.items()}
    weight = features(5)
    found = torch.autograd.grad(
        (residual(x, branch) * weight).sum(), [x, *[getattr(residual, s).weight for s in SLOTS]]
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
    torch.testing.assert_close(residual(x, branch), s + branch(s), **TOLERANCE[torch.float64])


def test_arguments_of_the_branch_pass_through() -> None:
    residual, gains = gained("pre")
    x = features()
    torch.testing.assert_close(residual(x, branch, factor=0.3), by_hand(x, gains, 0.3))


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


def test_scaling_twice_multiplies_and_leaves_the_first_spec_alone() -> None:
    spec = NormSpec.parse({"op": "rmsnorm", "scale": 3.0})
    assert spec.scaled(0.5).scaled(0.5).options["scale"] == 0.75
    assert spec.options == {"scale": 3.0}
    assert spec.scaled(0.5).build(DIM).scale == 1.5


def test_every_registered_operation_can_fill_a_slot() -> None:
    options = {"constant": {"value": 0.5}, "head_gain": {"heads": 2}}
    for name in OPERATIONS:
        spec = NormSpec(op=name, options=options.get(name, {}))
        residual = Residual(ResidualSpec(post=spec), DIM).double()
        x = features()
        torch.testing.assert_close(residual(x, branch), x + residual.post(branch(x)))
