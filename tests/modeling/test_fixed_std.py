"""FixedStd: a norm that becomes a constant at its step."""

import pytest
import torch
from torch import Tensor

from llmnorm.modeling.fixed_std import FixedStd
from llmnorm.modeling.layernorm import LayerNorm
from llmnorm.modeling.operations import list_norms
from llmnorm.modeling.rmsnorm import RMSNorm

pytestmark = pytest.mark.fast

DIM, EPS = 6, 1e-6


def moved(**options: object) -> FixedStd:
    norm = FixedStd(DIM, **options).double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, DIM))
        if norm.bias is not None:
            norm.bias.copy_(torch.linspace(1, 0, DIM))
    return norm


def rows(seed: int = 0) -> Tensor:
    """Features (3, 5, dim), position 0 ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, DIM, generator=generator, dtype=torch.float64)
    x[:, 0] *= 10
    return x


def step(norm: FixedStd, number: int, *batches: Tensor, counted: list[bool] | None = None) -> None:
    """A step of these micro-batches; `counted` rows of the last one."""
    for i, batch in enumerate(batches):
        rows_ = torch.ones(len(batch), dtype=torch.bool)
        if counted is not None and i == len(batches) - 1:
            rows_ = torch.tensor(counted)
        norm.before(rows_, first=i == 0)
        norm(batch)
    norm.after_step(number, norm.measured(number))


@pytest.mark.parametrize("centre", [False, True])
def test_it_begins_as_the_norm_and_ends_as_a_matrix(centre: bool) -> None:
    norm = moved(centre=centre, bias=True, remove_step=2, uniform_step=3, scale=0.5)
    usual = (LayerNorm if centre else RMSNorm)(DIM, bias=True, scale=0.5).double()
    usual.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    x = rows()
    torch.testing.assert_close(norm(x), usual(x))
    step(norm, 1, x)
    torch.testing.assert_close(norm(x), usual(x))
    step(norm, 2, x)
    h = x - x.mean(-1, keepdim=True) if centre else x
    std = (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    constants = torch.cat((std[:, :1].mean().expand(3, 1, 1), std[:, 1:].mean().expand(3, 4, 1)), 1)
    torch.testing.assert_close(norm(x), 0.5 * (norm.weight * h / constants + norm.bias))
    step(norm, 3, x)
    by_matrix = 0.5 * (norm.weight * h / std[:, 1:].mean() + norm.bias)
    torch.testing.assert_close(norm(x), by_matrix)
    torch.testing.assert_close(norm(x[0]), by_matrix[0])
    torch.testing.assert_close(norm(x[0, 0]), by_matrix[0, 0])
    step(norm, 4, rows(1))
    torch.testing.assert_close(norm(x), by_matrix)


def test_one_position_alone_is_not_position_0() -> None:
    norm = moved(remove_step=1, uniform_step=9)
    x = rows()
    step(norm, 1, x)
    norm.eval()
    whole = norm(x)
    torch.testing.assert_close(norm(x[:, 3:4]), whole[:, 3:4])
    assert (norm(x[:, :1]) / whole[:, :1]).mean().item() == pytest.approx(
        (norm.std_first / norm.std).item()
    )


def test_averages_are_over_all_counted_tokens_of_a_step_and_move_by_the_momentum() -> None:
    norm, other = (moved(remove_step=5, uniform_step=5, momentum=0.75) for _ in range(2))
    for number in (1, 2):
        x = rows(number)
        step(norm, number, x)
        padded = torch.cat((x[2:], 100 * x[:1]))
        step(other, number, x[:2], padded, counted=[True, False])
    torch.testing.assert_close(other.std, norm.std)
    torch.testing.assert_close(other.std_first, norm.std_first)
    first, second = ((rows(n).square().mean(-1) + EPS).sqrt()[:, 1:].mean() for n in (1, 2))
    torch.testing.assert_close(norm.std, (0.75 * first + 0.25 * second).reshape(1))


def test_a_removed_norm_keeps_its_constant_when_another_run_starts_from_it() -> None:
    norm = moved(remove_step=2, uniform_step=2)
    step(norm, 1, rows())
    step(norm, 2, rows())
    again = moved(remove_step=2, uniform_step=2)
    again.load_state_dict(norm.state_dict())
    x = rows(1)
    before = again(x)
    step(again, 1, 3 * x)
    torch.testing.assert_close(again(x), before)


def test_the_penalty_is_that_of_deviations_from_the_average_of_the_others() -> None:
    norm = moved(penalty=0.3, remove_step=9, uniform_step=9)
    norm.before(torch.ones(3, dtype=torch.bool), first=True)
    norm(rows())
    assert norm.penalty_sum.item() == 0  # no average yet
    step(norm, 1, rows())
    x = rows(1).requires_grad_()
    norm.before(torch.tensor([True, True, False]), first=True)
    norm(x)
    std = (x.square().mean(-1) + EPS).sqrt()[:2]
    by_hand = 0.3 * (std - norm.std.detach()).square().sum()
    torch.testing.assert_close(norm.penalty_sum, by_hand)
    found, wanted = (torch.autograd.grad(sum_, x)[0] for sum_ in (norm.penalty_sum, by_hand))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("removed", [False, True])
def test_gradients_are_those_of_the_formula(removed: bool) -> None:
    norm = moved(centre=True, bias=True, remove_step=1, uniform_step=2)
    if removed:
        step(norm, 1, rows())
    norm.eval()
    x = rows().requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"remove_step": 0}, "remove_step is 0; expected a number above 0"),
        ({"remove_step": 1.5, "uniform_step": 2}, "1.5; expected a whole number"),
        ({"remove_step": 5, "uniform_step": 4}, "uniform_step is 4, before remove_step=5"),
        ({"momentum": 1.0}, "expected a momentum below 1"),
        ({"penalty": -1.0}, "a penalty of at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FixedStd(DIM, **options)


def test_it_is_no_scheme_to_train_from_scratch() -> None:
    assert "fixed_std" not in list_norms()
