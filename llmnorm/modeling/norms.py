"""The norms: statistics and products in float32 or higher, the result in the input's dtype.

A constant of a scheme is a Python float on the module, never a buffer: a buffer is wiped when a
model is built on the meta device. Read `residual.py` next: it says where norms sit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .operations import check_positive, compute_dtype, register_norm


def _check(dim: int, **above_zero: float) -> None:
    if dim < 1:
        raise ValueError(f"a norm over {dim} features is impossible; expected at least 1")
    for name, value in above_zero.items():
        check_positive(name, value)


@register_norm("rmsnorm")
class RMSNorm(nn.Module):
    r"""Divide by the root mean square of the features.

        y = scale * weight * x / sqrt(mean(x^2) + eps)

    Shape: x and y are (..., dim); weight is (dim,).

    Args:
        dim: size of the feature axis.
        eps: added inside the root. A token of RMS far below sqrt(eps) is not normalized up.
        elementwise_affine: False leaves the weight out.
        cast: `output` multiplies by the weight in float32 and casts the result (OLMo 2);
            `input` casts first and multiplies in the weight's dtype (Llama). Equal in float32.
        scale: constant multiplier on the output, after the product.

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0`` or `cast` is unknown.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467;
    eps inside the root as in Llama.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        cast: str = "output",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check(dim, **{"rmsnorm.eps": eps, "rmsnorm.scale": scale})
        if cast not in ("input", "output"):
            raise ValueError(f"rmsnorm.cast is {cast!r}; expected 'input' or 'output'")
        self.eps, self.cast, self.scale = eps, cast, scale
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(compute_dtype(x))
        gain = self.scale if self.weight is None else self.scale * self.weight.to(h.dtype)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.cast == "input":
            h = h.to(x.dtype)
        return (gain * h).to(x.dtype)


@register_norm("layernorm")
class LayerNorm(nn.Module):
    r"""Subtract the mean of the features and divide by their standard deviation.

        y = scale * (weight * (x - mean(x)) / sqrt(var(x) + eps) + bias), biased variance

    Shape: x and y are (..., dim); weight and bias are (dim,).

    Args:
        dim: size of the feature axis.
        eps: added to the variance.
        elementwise_affine: False leaves weight and bias out.
        bias: False leaves the bias out.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check(dim, **{"layernorm.eps": eps, "layernorm.scale": scale})
        self.eps, self.scale = eps, scale
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and bias else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(compute_dtype(x))
        h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        h = (self.scale if self.weight is None else self.scale * self.weight.to(h.dtype)) * h
        if self.bias is not None:
            h = h + self.scale * self.bias.to(h.dtype)
        return h.to(x.dtype)


# Initial alpha of DyT in LLaMA models, by width: attention, then mlp and final norm (equal in every
# published row). Zhu et al. 2025, tables on LLaMA; widths 1024 and 2048 are from its ablation.
_ALPHA_BY_WIDTH = {
    1024: (1.0, 1.0),
    2048: (1.0, 0.5),
    4096: (0.8, 0.2),
    5120: (0.6, 0.15),
    8192: (0.2, 0.05),
}


def alpha_at(kind: str, hidden_size: int) -> float:
    """Initial alpha of a point-wise norm at an `attn`, `mlp` or `final` site.

    Piecewise linear in log2(hidden_size) through the published table, constant outside it.
    """
    column = 0 if kind == "attn" else 1
    widths = sorted(_ALPHA_BY_WIDTH)
    width = min(max(hidden_size, widths[0]), widths[-1])
    above = next(w for w in widths if w >= width)
    if above == width:
        return _ALPHA_BY_WIDTH[width][column]
    below = widths[widths.index(above) - 1]
    t = math.log2(width / below) / math.log2(above / below)
    low, high = _ALPHA_BY_WIDTH[below][column], _ALPHA_BY_WIDTH[above][column]
    return (1 - t) * low + t * high


def _with_alpha(options: dict[str, Any], kind: str, hidden_size: int) -> dict[str, Any]:
    """Replace a missing alpha by the table's, and a mapping `{attn, mlp, final}` by its site's."""
    given = options.get("alpha")
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {"attn", "mlp", "final"})
        if unknown:
            raise ValueError(f"alpha has no site {unknown[0]!r}; its sites: attn, mlp, final")
        given = given.get(kind)
    return {**options, "alpha": alpha_at(kind, hidden_size) if given is None else given}


@register_norm("dyt")
class DyT(nn.Module):
    r"""Squash features with a learned tanh instead of normalizing them.

        y = scale * (weight * tanh(alpha * x) + bias)

    Element-wise: no statistic of the features is computed, so no reduction is needed.

    Shape: x and y are (..., dim); weight and bias are (dim,); alpha is (1,).

    Args:
        dim: size of the feature axis.
        alpha: initial steepness. Wide models want it smaller, attention larger than mlp;
            in a config it may be a mapping `{attn, mlp, final}` and defaults to `alpha_at`.
        bias: the paper's vision code has a bias, its LLaMA code has none.
        scale: constant multiplier on the output; 1 except under depth-scaled placements.

    Raises:
        ValueError: if ``dim < 1`` or ``alpha <= 0``.

    Source: Zhu et al., "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.
    """

    pointwise = True
    options_at = staticmethod(_with_alpha)

    def __init__(
        self, dim: int, *, alpha: float = 1.0, bias: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        _check(dim, **{"dyt.alpha": alpha, "dyt.scale": scale})
        self.alpha_init, self.scale = alpha, scale
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        init.constant_(self.alpha, self.alpha_init)
        init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.alpha * x.to(compute_dtype(x)))
        h = (self.scale * self.weight.to(h.dtype)) * h
        if self.bias is not None:
            h = h + self.scale * self.bias.to(h.dtype)
        return h.to(x.dtype)


@register_norm("derf")
class Derf(nn.Module):
    r"""Squash features with a learned error function instead of normalizing them.

        y = scale * (weight * erf(alpha * x + shift) + bias)

    Shape: x and y are (..., dim); weight and bias are (dim,); alpha and shift are (1,).

    Args:
        dim: size of the feature axis.
        alpha: initial steepness; in a config it may be a mapping `{attn, mlp, final}` and defaults
            to DyT's table (`alpha_at`): the paper's language-model values are unpublished. Its
            general default is 0.5.
        shift: initial shift.
        bias: False leaves the bias out.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``alpha <= 0``.

    Source: "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.
    """

    pointwise = True
    options_at = staticmethod(_with_alpha)

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 1.0,
        shift: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check(dim, **{"derf.alpha": alpha, "derf.scale": scale})
        self.alpha_init, self.shift_init, self.scale = alpha, shift, scale
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))
        self.shift = nn.Parameter(torch.full((1,), float(shift)))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        init.constant_(self.alpha, self.alpha_init)
        init.constant_(self.shift, self.shift_init)
        init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.erf(self.alpha * x.to(compute_dtype(x)) + self.shift)
        h = (self.scale * self.weight.to(h.dtype)) * h
        if self.bias is not None:
            h = h + self.scale * self.bias.to(h.dtype)
        return h.to(x.dtype)
