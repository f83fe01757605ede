"""Norms by running statistics: formulas by hand, the leak of the future, the fold."""

import pytest
import torch
from features import DIM, assert_same, features, shaken
from torch import nn

from llmnorm.running_norms import PowerNorm, UnifiedNorm

pytestmark = pytest.mark.fast

BOTH = [
    lambda: PowerNorm(DIM, warmup_steps=2, groups=4),
    lambda: UnifiedNorm(DIM, warmup_steps=2, window=3),
]
IDS = ["powernorm", "unified_norm"]


def trained(norm: nn.Module, steps: int = 4) -> nn.Module:
    """The norm after some steps of training."""
    shaken(norm).train()
    for step in range(steps):
        norm((1 + step) * features(2, 3, DIM, seed=step)).sum().backward()
        norm.zero_grad()
    return norm


def test_powernorm_in_its_warm_up_is_the_batchs_mean_square_of_each_feature() -> None:
    norm = shaken(PowerNorm(DIM, groups=2, warmup_steps=5))
    x = features(2, 3, DIM)
    u = torch.cat(
        [part / torch.sqrt(part.pow(2).mean(-1, keepdim=True) + 1e-5) for part in x.split(8, -1)],
        dim=-1,
    )
    square = u.pow(2).sum((0, 1)) / 6
    assert_same(norm(x), norm.weight * u / torch.sqrt(square + 1e-5) + norm.bias)
    assert_same(norm.running_square, 0.9 * square + 0.1 * square)  # the plain average is the first


def test_powernorm_after_its_warm_up_uses_what_ran_before_this_step() -> None:
    norm = shaken(PowerNorm(DIM, warmup_steps=0))
    before = norm.running_square.clone()
    x = features(2, 3, DIM)
    u = norm.group_scaled(x)
    assert_same(norm(x), norm.weight * u / torch.sqrt(before + 1e-5) + norm.bias)
    assert_same(norm.running_square, 0.9 * before + 0.1 * u.pow(2).mean((0, 1)))


def test_powernorm_gradient_subtracts_a_running_sum_that_ignores_the_statistics() -> None:
    norm = trained(PowerNorm(DIM, warmup_steps=9, backward_momentum=0.7))
    x, dy = features(2, 3, DIM).requires_grad_(), features(2, 3, DIM, seed=1)
    total = norm.gradient_sum.clone()
    u = norm.group_scaled(x).detach()
    std = torch.sqrt(u.pow(2).mean((0, 1)) + 1e-5)
    z, g = u / std, dy * norm.weight.detach()
    h = g - 0.3 * total * z
    (found,) = torch.autograd.grad(norm(x), x, dy)
    (wanted,) = torch.autograd.grad(norm.group_scaled(x), x, h / std)
    assert_same(found, wanted)
    assert_same(norm.gradient_sum, total + (h * z).mean((0, 1)))


def test_unified_norm_uses_the_geometric_mean_of_its_window() -> None:
    norm = shaken(UnifiedNorm(DIM, warmup_steps=0, window=2))
    batches = [(1 + i) * features(2, 3, DIM, seed=i) for i in range(3)]
    outputs = [norm(x) for x in batches]
    squares = [x.pow(2).mean((0, 1)) for x in batches]
    for step, used in enumerate([squares[0], squares[1], torch.sqrt(squares[1] * squares[2])]):
        wanted = norm.weight * batches[step] / torch.sqrt(used + 1e-5) + norm.bias
        assert_same(outputs[step], wanted)


def test_unified_norm_skips_a_step_with_an_outlier() -> None:
    norm = trained(UnifiedNorm(DIM, warmup_steps=0, window=2, filtering=True), steps=3)
    skipped = norm.skipped.item()
    x = features(2, 3, DIM)
    x[0, 0, 0] = 1e3
    expected = norm.weight * x / torch.sqrt(x.pow(2).mean((0, 1)) + 1e-5) + norm.bias
    before = norm.running_square.clone()
    assert_same(norm(x), expected)  # by this batch alone
    assert norm.skipped.item() == skipped + 1
    assert_same(norm.squares[int(norm.steps) % 2], before)  # the outlier does not enter the window


@pytest.mark.parametrize(("root", "skipped"), [(2.2, 0), (2.5, 1)])
def test_an_outlier_exceeds_the_window_times_the_sample_variance_of_its_roots(
    root: float, skipped: int
) -> None:
    """Roots 1 and 2: variance 1/2, threshold 1. Beside 1, v exceeds by (sqrt(v) - 1)^2 / 2."""
    norm = UnifiedNorm(1, warmup_steps=0, window=2, filtering=True).double()
    norm.squares.copy_(torch.tensor([[1.0], [4.0]]))  # step 1 replaces the second
    norm(torch.full((3, 1), root, dtype=torch.float64))
    assert norm.skipped.item() == skipped


@pytest.mark.parametrize("build", BOTH, ids=IDS)
def test_padding_is_left_out_of_the_statistics(build) -> None:
    x, mask = features(2, 3, DIM), torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    loud = x.clone()
    loud[1, 2] *= 50.0
    one, other = shaken(build()), shaken(build())
    assert_same(one(x, mask)[~mask], other(loud, mask)[~mask])
    assert_same(one.running_square, other.running_square)
    assert not torch.allclose(shaken(build())(loud)[~mask], one(x, mask)[~mask])


@pytest.mark.parametrize("build", BOTH, ids=IDS)
def test_training_leaks_the_future_and_evaluation_does_not(build) -> None:
    """The reason why these are no norms of the table: a token's output depends on later tokens."""
    x = features(1, 6, DIM)
    other = x.clone()
    other[0, 5] += 3.0
    one, two = trained(build(), steps=1), trained(build(), steps=1)
    assert not torch.allclose(one.train()(x)[0, :5], two.train()(other)[0, :5])
    one.eval()
    assert torch.equal(one(x)[0, :5], one(other)[0, :5])


@pytest.mark.parametrize("build", BOTH, ids=IDS)
def test_in_evaluation_the_norm_is_its_fold_and_folds_into_a_linear_layer(build) -> None:
    norm, x = trained(build()).eval(), features(4, DIM)
    given = norm.group_scaled(x) if isinstance(norm, PowerNorm) else x
    scale, bias = norm.fold()
    assert_same(norm(x), scale * given + bias)
    linear = nn.Linear(DIM, 3).double()
    folded = nn.functional.linear(given, linear.weight * scale, linear.bias + linear.weight @ bias)
    assert_same(folded, linear(norm(x)))
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(100 * x)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())


def test_widths_and_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="3 groups do not divide a width of 16"):
        PowerNorm(DIM, groups=3)
    with pytest.raises(ValueError, match="windows 0 and 4; expected at least 1"):
        UnifiedNorm(DIM, window=0, backward_window=4)
