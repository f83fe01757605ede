"""SeeDNorm: an RMSNorm whose gain depends on the token."""

import torch
from torch import nn

from .affine import AffineNorm, check_norm
from .operations import compute_dtype, register_norm
from .rmsnorm import divide_by_rms


@register_norm("seednorm")
class SeedNorm(AffineNorm):
    r"""Divide by the root mean square and multiply by a gain that the token chooses.

        y = scale * (tanh(sum(x * beta)) * alpha + weight) * x / sqrt(mean(x^2) + eps)

    With beta 0 this is RMSNorm, and alpha has no gradient until beta has moved. Not foldable: the
    gain depends on the token.

    Shape: x and y are (..., dim); alpha, beta and weight are (dim,).

    Args:
        dim: size of the feature axis.
        alpha: initial alpha. The paper's initial alpha and beta are not verified: 1 and 0 are
            ours, so that training starts at RMSNorm and beta has a gradient.
        beta: initial beta.
        eps: inside the root.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: SeeDNorm, ICLR 2026, arXiv:2510.22777 (formula from a transcription; its multi-head
    variant is not implemented).
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        eps: float = 1e-6,
        scale: float = 1.0,
    ) -> None:
        check_norm("seednorm", dim, eps=eps, scale=scale)
        super().__init__(dim, scale=scale)
        self.start("alpha", dim, alpha)
        self.start("beta", dim, beta)
        self.eps = eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return divide_by_rms(h, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(compute_dtype(x))
        chosen = torch.tanh((h * self.beta).sum(-1, keepdim=True)) * self.alpha + self.weight
        # The constant last: servers take gain * normalized alone for an RMSNorm with that `weight`.
        return (self.scale * (chosen * self.normalized(h))).to(x.dtype)
