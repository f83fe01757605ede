"""Norms by the length of the features, and their equalities with RMSNorm."""

import pytest
import torch
from features import (
    DIM,
    assert_follows_formula,
    assert_gradients_match_finite_differences,
    assert_same,
    features,
    norm_of,
    shaken,
)

from llmnorm.modeling.norms import FixNorm, L2Norm, RMSNorm, ScaleNorm

pytestmark = pytest.mark.fast


def lengths(x: torch.Tensor) -> torch.Tensor:
    """|x| of each row, number by number."""
    return torch.stack([torch.sqrt(sum(v * v for v in row)) for row in x])[:, None]


@pytest.mark.parametrize("gain", ["none", "scalar", "vector"])
@pytest.mark.parametrize(("length", "value"), [("one", 1.0), ("sqrt_dim", DIM**0.5)])
def test_l2norm_gives_a_fixed_length_times_its_gain(length: str, value: float, gain: str) -> None:
    norm = norm_of("l2norm", length=length, gain=gain, scale=0.5)
    assert_follows_formula(norm, lambda x, p: 0.5 * value * p.get("weight", 1.0) * x / lengths(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_l2norm_of_groups_gives_each_group_its_own_length(groups: int) -> None:
    x, size = 3.0 * features(4, DIM), DIM // groups
    parts = L2Norm(DIM, groups=groups)(x).split(size, dim=-1)
    for part, given in zip(parts, x.split(size, dim=-1), strict=True):
        assert_same(part, given / lengths(given))
    unit_rms = L2Norm(DIM, groups=groups, length="sqrt_dim")(x).split(size, dim=-1)
    for part in unit_rms:
        assert_same(part.pow(2).mean(-1), torch.ones(4).double())


def test_scalenorm_gives_one_learned_length() -> None:
    assert_follows_formula(norm_of("scalenorm"), lambda x, p: p["weight"] * x / lengths(x))


def test_fixnorm_gives_the_length_sqrt_dim() -> None:
    assert_follows_formula(norm_of("fixnorm"), lambda x, _: DIM**0.5 * x / lengths(x))
    assert_same(FixNorm(DIM)(features(3, DIM)), L2Norm(DIM, length="sqrt_dim")(features(3, DIM)))


@pytest.mark.parametrize(
    "options",
    [{"gain": "vector"}, {"gain": "scalar", "length": "sqrt_dim"}, {"groups": 4}],
    ids=str,
)
def test_gradients_of_the_variants_match_finite_differences(options: dict) -> None:
    assert_gradients_match_finite_differences(norm_of("l2norm", **options))


def test_scalenorm_is_rmsnorm_with_the_gain_g_over_sqrt_dim() -> None:
    x, scalenorm = features(4, DIM), shaken(ScaleNorm(DIM))
    rmsnorm = RMSNorm(DIM, eps=1e-30).double()
    with torch.no_grad():
        rmsnorm.weight.fill_(scalenorm.weight.item() / DIM**0.5)
    assert_same(scalenorm(x), rmsnorm(x))


def test_scalenorm_is_the_l2norm_with_a_scalar_gain_of_sqrt_dim() -> None:
    x = features(4, DIM)
    same = L2Norm(DIM, eps=1e-5, gain="scalar", weight_init=DIM**0.5)
    assert torch.equal(ScaleNorm(DIM)(x), same(x))


@pytest.mark.parametrize("op", ["l2norm", "scalenorm", "fixnorm"])
def test_norms_of_a_length_are_scale_free_above_eps_and_linear_below(op: str) -> None:
    x, norm = features(4, DIM), norm_of(op, eps=1e-5)
    assert_same(norm(37.0 * x), norm(x))
    tiny = 1e-8 * x
    assert_same(norm(2.0 * tiny), 2.0 * norm(tiny))


def test_gains_of_unit_queries_and_keys_are_a_learned_factor_of_their_cosine() -> None:
    q, k = features(5, DIM), features(5, DIM, seed=1)
    cosine = torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=-1)
    start = (3.0 * DIM**0.5) ** 0.5  # both gains and 1/sqrt(head_dim): 3
    norm = L2Norm(DIM, gain="scalar", weight_init=start).double()
    logits = norm(q) @ norm(k).T / DIM**0.5
    torch.testing.assert_close(logits, 3.0 * cosine, rtol=1e-6, atol=1e-8)  # float32 start
