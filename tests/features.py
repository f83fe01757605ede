"""What the tests of single norms share: features, and a norm moved off its initial values."""

from collections.abc import Callable
from typing import Any

import torch
from schemes import TOLERANCE
from torch import nn

from llmnorm.modeling.residual import NormSpec

DIM = 16


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 features."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shaken(norm: nn.Module, seed: int = 7) -> nn.Module:
    """The norm in float64 with every parameter moved off its initial value."""
    norm.double()
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter += 0.3 * features(*parameter.shape, seed=seed + i)
    return norm


def norm_of(op: str, dim: int = DIM, **options: Any) -> nn.Module:
    """A shaken norm of the table."""
    return shaken(NormSpec.parse({"op": op, **options}).build(dim))


def parameters(norm: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, without a graph."""
    return {name: value.detach() for name, value in norm.named_parameters()}


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])


def assert_follows_formula(
    norm: nn.Module, formula: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
) -> None:
    """The norm and `formula(x, parameters)` give the same values and the same gradients."""
    names, values = zip(*norm.named_parameters(), strict=True) if parameters(norm) else ((), ())
    moved = [i for i, value in enumerate(values) if value.requires_grad]
    x, g = features(4, DIM).requires_grad_(), features(4, DIM, seed=1)
    copies = [value.detach().clone().requires_grad_() for value in values]
    found, wanted = norm(x), formula(x, dict(zip(names, copies, strict=True)))
    assert_same(found, wanted)
    ours = torch.autograd.grad(found, [x, *(values[i] for i in moved)], g)
    theirs = torch.autograd.grad(wanted, [x, *(copies[i] for i in moved)], g)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def assert_gradients_match_finite_differences(norm: nn.Module) -> None:
    """`gradcheck` of the input and of every parameter."""
    names, values = zip(*norm.named_parameters(), strict=True) if parameters(norm) else ((), ())

    def call(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(names, given, strict=True)), (x,))

    x = features(2, 2, DIM).requires_grad_()
    assert torch.autograd.gradcheck(
        call, (x, *(value.detach().clone().requires_grad_() for value in values))
    )
