"""SeeDNorm against its formula."""

import pytest
import torch
from features import DIM, assert_follows_formula, assert_same, features, norm_of

from llmnorm.modeling.norms import RMSNorm, SeedNorm

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_seednorm_adds_to_the_gain_what_the_token_chooses(eps: float) -> None:
    def by_hand(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = []
        for row in x:
            chosen = torch.tanh(sum(v * b for v, b in zip(row, p["beta"], strict=True)))
            rms = torch.sqrt(sum(v * v for v in row) / DIM + eps)
            rows.append((chosen * p["alpha"] + p["weight"]) * row / rms)
        return 0.5 * torch.stack(rows)

    assert_follows_formula(norm_of("seednorm", eps=eps, scale=0.5), by_hand)


def test_seednorm_starts_as_rmsnorm_and_beta_moves_first() -> None:
    x, norm = features(4, DIM), SeedNorm(DIM).double()
    assert_same(norm(x), RMSNorm(DIM).double()(x))
    alpha, beta = torch.autograd.grad(norm(x).sum(), [norm.alpha, norm.beta])
    assert not alpha.any()
    assert beta.all()


def test_the_gain_differs_from_token_to_token() -> None:
    x, norm = features(2, DIM), norm_of("seednorm")
    gain = norm(x) / RMSNorm(DIM, elementwise_affine=False)(x)
    assert not torch.allclose(gain[0], gain[1])
