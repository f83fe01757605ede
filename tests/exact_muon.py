"""Muon's iteration without its bfloat16, whose rounding hides whether two engines agree."""

from torch import Tensor


def zeropower(
    update: Tensor, factors: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """As torch's Newton-Schulz iteration, in float64."""
    a, b, c = factors
    x = update.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if update.shape[0] > update.shape[1] else x).to(update.dtype)
