"""Point-wise norms: each feature is squashed by itself, no statistic is taken.

DyT and Derf are the two that were trained as language models; `pointwise` offers the rest of the
family they were chosen from.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .affine import AffineNorm, check_norm, given_at
from .operations import register_norm

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
    given = given_at("alpha", options, kind, ("attn", "mlp", "final"))
    return {**options, "alpha": alpha_at(kind, hidden_size) if given is None else given}


Function = Callable[[torch.Tensor], torch.Tensor]

# exproot and power23_clip have an infinite slope at u = 0. Below this |u| the root is replaced by
# its chord from 0: still continuous, odd and monotone, off by at most sqrt(_CHORD) / 4 for exproot,
# 0.15 * _CHORD^(2/3) for power23_clip, and no steeper than 1e3 and 1e2.
_CHORD = 1e-6


def _odd(positive: Function) -> Function:
    """sgn(u) * positive(|u|), with the slope of `positive` at u = 0 instead of sgn's 0."""

    def function(u: torch.Tensor) -> torch.Tensor:
        return torch.where(u < 0, -1.0, 1.0) * positive(torch.where(u < 0, -u, u))

    return function


def _root(power: float) -> Function:
    """a^power for a >= 0; below `_CHORD` its chord from 0."""

    def function(a: torch.Tensor) -> torch.Tensor:
        chord = a * _CHORD ** (power - 1)
        return torch.where(a < _CHORD, chord, a.clamp_min(_CHORD).pow(power))

    return function


def _cube(u: torch.Tensor) -> torch.Tensor:
    """u^3; beyond 1e6, where cubsign is 1 in any precision, that of 1e6: the cube overflows."""
    return u.clamp(-1e6, 1e6).pow(3)


def _clip(u: torch.Tensor) -> torch.Tensor:
    return u.clamp(-1, 1)


def _satur(u: torch.Tensor) -> torch.Tensor:
    return u / (u + 1)


FUNCTIONS: dict[str, Function] = {
    "arctan": lambda u: (2 / math.pi) * torch.atan(u),
    "cubsign": lambda u: _cube(u) / (_cube(u).abs() + 1),
    "erf": torch.erf,
    "exproot": _odd(lambda a: -torch.expm1(-_root(1 / 2)(a))),
    "expsign": _odd(lambda a: -torch.expm1(-a)),
    "isru": lambda u: u / torch.hypot(u, torch.ones_like(u)),
    "linear_clip": _clip,
    "logquad_clip": _odd(lambda a: _clip(torch.log1p(a * a))),
    "logsign_clip": _odd(lambda a: _clip(torch.log1p(a))),
    "power23_clip": _odd(lambda a: _clip(_root(2 / 3)(a))),
    "relsign": lambda u: u / (torch.hypot(u, torch.ones_like(u)) + 1),
    "satursin": lambda u: torch.sin(u.clamp(-math.pi / 2, math.pi / 2)),
    "saturlog": _odd(lambda a: _satur(torch.log1p(a))),
    "smoothsign": _odd(_satur),
    "smoothsign_clip": _odd(lambda a: _clip(_satur(a))),
    "tanh": torch.tanh,
}


@register_norm("dyt")
class DyT(AffineNorm):
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
    alpha: nn.Parameter

    def __init__(
        self, dim: int, *, alpha: float = 1.0, bias: bool = False, scale: float = 1.0
    ) -> None:
        check_norm("dyt", dim, alpha=alpha, scale=scale)
        super().__init__(dim, bias=bias, scale=scale, scalars={"alpha": alpha})

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * h)


@register_norm("derf")
class Derf(AffineNorm):
    r"""Squash features with a learned error function instead of normalizing them.

        y = scale * (weight * erf(alpha * x + shift) + bias)

    Shape: x and y are (..., dim); weight and bias are (dim,); alpha and shift are (1,).

    Args:
        dim: size of the feature axis.
        alpha: initial steepness; in a config it may be a mapping `{attn, mlp, final}` and defaults
            to DyT's table (`alpha_at`): the paper's language-model values were not found. The
            layer of its code has 0.5.
        shift: initial shift.
        bias: False leaves the bias out.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``alpha <= 0``.

    Source: "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.
    """

    pointwise = True
    options_at = staticmethod(_with_alpha)
    alpha: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 1.0,
        shift: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        check_norm("derf", dim, alpha=alpha, scale=scale)
        super().__init__(dim, bias=bias, scale=scale, scalars={"alpha": alpha, "shift": shift})

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return torch.erf(self.alpha * h + self.shift)


@register_norm("pointwise")
class Pointwise(AffineNorm):
    r"""Squash features with a chosen function instead of normalizing them.

        y = scale * (weight * f(u) + bias),  u = alpha * x + shift

    f is one of `FUNCTIONS`, the candidates of the Derf paper: all are odd, monotone and bounded by
    1. With a = |u| and clip to [-1, 1]: `arctan` (2/pi) atan(u), `cubsign` u^3 / (a^3 + 1), `erf`,
    `exproot` sgn(u) (1 - exp(-sqrt(a))), `expsign` sgn(u) (1 - exp(-a)), `isru`
    u / sqrt(u^2 + 1), `linear_clip` clip(u), `logquad_clip` clip(sgn(u) ln(u^2 + 1)),
    `logsign_clip` clip(sgn(u) ln(a + 1)), `power23_clip` clip(sgn(u) a^(2/3)), `relsign`
    u / (sqrt(u^2 + 1) + 1), `satursin` sin(u clipped to half pi), `saturlog`
    sgn(u) ln(a + 1) / (ln(a + 1) + 1), `smoothsign` u / (a + 1), `smoothsign_clip` the same
    clipped, which changes nothing, `tanh`. The root in exproot and power23_clip is a straight line
    below a = 1e-6, so that its slope at 0 is finite (the gradient of the paper's code has 0
    times infinity there).

    Shape: x and y are (..., dim); weight and bias are (dim,); alpha and shift are (1,).

    Args:
        dim: size of the feature axis.
        function: name of f.
        alpha: initial steepness; in a config it may be a mapping `{attn, mlp, final}` and defaults
            to DyT's table (`alpha_at`); the layer of the paper's code has 0.5.
        shift: initial shift.
        bias: False leaves the bias out.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1``, ``alpha <= 0`` or `function` is unknown.

    Source: "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.
    """

    pointwise = True
    options_at = staticmethod(_with_alpha)
    alpha: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        function: str = "erf",
        alpha: float = 1.0,
        shift: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        check_norm("pointwise", dim, alpha=alpha, scale=scale)
        if function not in FUNCTIONS:
            known = ", ".join(FUNCTIONS)
            raise ValueError(f"pointwise.function is {function!r}; expected one of {known}")
        super().__init__(dim, bias=bias, scale=scale, scalars={"alpha": alpha, "shift": shift})
        self.function, self.squash = function, FUNCTIONS[function]

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return self.squash(self.alpha * h + self.shift)
