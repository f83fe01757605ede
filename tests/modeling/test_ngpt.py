"""nGPT's gains: stored on one scale, used on another; and a query that carries the whole scale."""

import math

import pytest
import torch
from schemes import TOLERANCE

from llmnorm.modeling.ngpt import NGPTGain, NGPTQuery, NGPTRate

pytestmark = pytest.mark.fast

DIM, HEADS, GROUPS, SEQ = 6, 4, 2, 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("op", [NGPTGain, NGPTRate])
def test_a_stored_gain_is_restored_and_a_rate_is_never_negative(op: type) -> None:
    gain = op(DIM, value=0.05, stored=0.25).double()
    x, weight = randn(2, DIM, seed=1), randn(DIM, seed=2)
    assert (weight < 0).any()
    gain.weight.data.copy_(weight)
    wanted = 0.2 * (weight.abs() if op is NGPTRate else weight) * x
    torch.testing.assert_close(gain(x), wanted, **TOLERANCE[torch.float64])
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(gain, {"weight": w}, x), (x, gain.weight)
    )


@pytest.mark.parametrize("op", [NGPTGain, NGPTRate])
def test_a_gain_starts_at_its_value_and_moves_as_fast_as_its_storage(op: type) -> None:
    gain = op(DIM, value=0.05, stored=0.25).double()
    assert gain.weight.tolist() == [0.25] * DIM
    x = torch.ones(DIM, dtype=torch.float64)
    torch.testing.assert_close(gain(x), 0.05 * x)
    with torch.no_grad():
        gain.weight += 0.25 / 100  # one percent of what is stored is one of what is used
    torch.testing.assert_close(gain(x), 1.01 * 0.05 * x)
    gain.reset_parameters()
    assert gain.weight.tolist() == [0.25] * DIM


def scores_of_the_paper(q: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """sqrt(head_dim) (s q/|q|) (s k/|k|), with s (heads, head_dim) of the query's head."""
    found = torch.empty(2, HEADS, SEQ, SEQ, dtype=torch.float64)
    for head in range(HEADS):
        query, key = q[:, head], k[:, head * GROUPS // HEADS]
        query = s[head] * query / query.norm(dim=-1, keepdim=True)
        key = s[head] * key / key.norm(dim=-1, keepdim=True)
        found[:, head] = math.sqrt(DIM) * query @ key.mT
    return found


def test_the_gain_on_queries_alone_gives_the_papers_scores_and_their_gradients() -> None:
    op = NGPTQuery(DIM, heads=HEADS, value=1.0, stored=0.25).double()
    op.weight.data.copy_(randn(HEADS * DIM, seed=3))
    q, k = randn(2, HEADS, SEQ, DIM, seed=4), randn(2, GROUPS, SEQ, DIM, seed=5)
    q.requires_grad_()
    unit_k = (k / k.norm(dim=-1, keepdim=True)).repeat_interleave(HEADS // GROUPS, dim=1)
    ours = op(q) @ unit_k.mT / math.sqrt(DIM)
    paper = scores_of_the_paper(q, k, (op.weight / 0.25).view(HEADS, DIM))
    torch.testing.assert_close(ours, paper, **TOLERANCE[torch.float64])
    weight = randn(*ours.shape, seed=6)
    found = torch.autograd.grad((ours * weight).sum(), [q, op.weight])
    wanted = torch.autograd.grad((paper * weight).sum(), [q, op.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])


def test_a_query_has_the_length_head_dim_whatever_comes_in() -> None:
    op = NGPTQuery(DIM, heads=HEADS, value=1.0, stored=0.25).double()
    q = randn(2, HEADS, SEQ, DIM) * 1e6
    lengths = op(q).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, DIM))
    assert torch.equal(op(torch.zeros_like(q)), torch.zeros_like(q))


def test_results_keep_the_dtype_of_the_features() -> None:
    x = randn(2, HEADS, SEQ, DIM).bfloat16()
    for op in (NGPTGain(DIM), NGPTRate(DIM), NGPTQuery(DIM, heads=HEADS)):
        assert op(x).dtype == torch.bfloat16
        exact = op.double()(x.double())
        torch.testing.assert_close(op(x).double(), exact, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("option", ["value", "stored", "eps"])
@pytest.mark.parametrize("number", [0.0, -1.0])
def test_numbers_that_are_not_above_zero_are_refused(option: str, number: float) -> None:
    with pytest.raises(ValueError, match=rf"{option} is -?\d\.0; expected a number above 0"):
        NGPTQuery(DIM, **{option: number})
