"""BHyT: normalize, then squash. The star form measures every input; the full form need not."""

from typing import Any

import torch
from torch import nn

from .affine import AffineNorm, check_norm, given_at, rmsnorm_like
from .operations import compute_dtype, register_norm

_LAM = {"attn": 2.0, "mlp": 1.0}


def _at_site(options: dict[str, Any], kind: str, hidden_size: int) -> dict[str, Any]:
    """Read lam at its site; the final norm is rmsnorm, or BHyT with `last_lam`."""
    last, lam = options.pop("last_lam", 0), given_at("lam", options, kind, tuple(_LAM))
    if kind != "final":
        return {**options, "lam": _LAM[kind] if lam is None else lam}
    return {**options, "lam": last} if last else rmsnorm_like(options)


@register_norm("bhyt")
class BHyT(AffineNorm):
    r"""Bound the normalized features with a tanh that is nearly linear at first.

        y = scale * weight * tanh(lam * x / (kappa * sqrt(m + eps))),  m = mean(x^2)

    At initialization about RMSNorm with gain lam / kappa (`rmsnorm` with that `weight_init` is the
    control), softly clipped where |x| is kappa / lam times the RMS. Used as it is at every site,
    this is the paper's star form; the full form passes an estimate of m to the mlp's norm.

    Shape: x and y are (..., dim); m is (..., 1); weight is (dim,); lam is (1,).

    Args:
        dim: size of the feature axis.
        lam: initial steepness; in a config it may be a mapping `{attn, mlp}`, which the paper sets
            to (2, 1), our default there, or (3, 3). In a config `last_lam` is that of the final
            norm; 0, the default, makes that norm an rmsnorm.
        kappa: the constant that lam is divided by.
        eps: inside the root.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or an option is not above 0.

    Source: BHyT, ICML 2026, arXiv:2601.09719.
    """

    options_at = staticmethod(_at_site)
    config_options = ("last_lam",)
    lam: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        lam: float = 2.0,
        kappa: float = 10.0,
        eps: float = 1e-6,
        scale: float = 1.0,
    ) -> None:
        check_norm("bhyt", dim, lam=lam, kappa=kappa, eps=eps, scale=scale)
        super().__init__(dim, scale=scale, scalars={"lam": lam})
        self.kappa, self.eps = kappa, eps

    def forward(self, x: torch.Tensor, mean_square: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the norm; a given `mean_square` (..., 1) is used instead of that of x."""
        h = x.to(compute_dtype(x))
        m = h.pow(2).mean(-1, keepdim=True) if mean_square is None else mean_square
        steepness = self.lam.to(h.dtype) / self.kappa
        return self.affine(torch.tanh(steepness * h * torch.rsqrt(m + self.eps)), x.dtype)
