"""RMSNorm and its kin: divide by a root mean square of the features. Next: `unitnorm.py`."""

import torch

from .affine import AffineNorm, check_choice, check_norm
from .operations import compute_dtype, register_norm


def divide_by_rms(h: torch.Tensor, eps: float) -> torch.Tensor:
    """h / sqrt(mean(h^2) + eps), over the last axis."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def divide_by_rms_and_eps(h: torch.Tensor, count: int, eps: float) -> torch.Tensor:
    """h / (rms + eps), the RMS that of the first `count` features; its gradient at 0 is 0."""
    length = torch.linalg.vector_norm(h[..., :count], dim=-1, keepdim=True)
    return h / (length * count**-0.5 + eps)


@register_norm("rmsnorm")
class RMSNorm(AffineNorm):
    r"""Divide by the root mean square of the features.

        y = scale * (weight * x / sqrt(mean(x^2) + eps) + bias)

    Shape: x and y are (..., dim); weight and bias are (dim,), a scalar weight is (1,).

    Args:
        dim: size of the feature axis.
        eps: a token of RMS far below sqrt(eps) is not normalized up.
        eps_placement: `inside` the root, or `outside`: x / (sqrt(mean(x^2)) + eps), as in the
            paper's code (with eps 1e-8), which normalizes up to RMS eps.
        elementwise_affine: False leaves weight and bias out.
        gain: `vector`, one weight a feature, or `scalar`, one for all.
        unit_offset: multiply by 1 + weight, weight initially 0 (Gemma): weight decay then pulls
            the gain toward 1.
        bias: True adds a learned bias (the paper's code calls it offset).
        weight_init: initial gain, 1 + weight with `unit_offset`.
        cast: `output` multiplies by the weight in float32 and casts the result (OLMo 2, Gemma);
            `input` casts first and multiplies in the weight's dtype (Llama). Equal in float32.
        scale: constant multiplier on the output, after the product.

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0``, a word is unknown, or an option asks something
            of the weight that `elementwise_affine` leaves out.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467;
    eps inside the root as in Llama.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        eps_placement: str = "inside",
        elementwise_affine: bool = True,
        gain: str = "vector",
        unit_offset: bool = False,
        bias: bool = False,
        weight_init: float = 1.0,
        cast: str = "output",
        scale: float = 1.0,
    ) -> None:
        check_norm("rmsnorm", dim, eps=eps, scale=scale)
        check_choice("rmsnorm.eps_placement", eps_placement, ("inside", "outside"))
        check_choice("rmsnorm.gain", gain, ("vector", "scalar"))
        check_choice("rmsnorm.cast", cast, ("input", "output"))
        asked = gain != "vector" or unit_offset or bias or weight_init != 1.0
        if asked and not elementwise_affine:
            raise ValueError(
                "rmsnorm.elementwise_affine is False, which leaves weight and bias out; "
                "expected gain, unit_offset, bias and weight_init at their defaults"
            )
        super().__init__(
            dim,
            gain=gain if elementwise_affine else "none",
            weight_init=weight_init,
            unit_offset=unit_offset,
            bias=bias,
            scale=scale,
        )
        self.dim, self.eps, self.eps_placement, self.cast = dim, eps, eps_placement, cast

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        if self.eps_placement == "outside":
            return divide_by_rms_and_eps(h, self.dim, self.eps)
        return divide_by_rms(h, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.normalized(x.to(compute_dtype(x)))
        return self.affine(h.to(x.dtype) if self.cast == "input" else h, x.dtype)


@register_norm("simple_rmsnorm")
class SimpleRMSNorm(AffineNorm):
    r"""Divide by the root mean square of the features, without a gain: RMSNorm with weight 1.

        y = scale * x / sqrt(mean(x^2) + eps), which is sqrt(dim) * x / |x| up to eps

    Shape: x and y are (..., dim); no parameters.

    Args:
        dim: size of the feature axis.
        eps: inside the root, as in our RMSNorm.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: Qin et al., "TransNormerLLM", 2023, arXiv:2307.14995.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, scale: float = 1.0) -> None:
        check_norm("simple_rmsnorm", dim, eps=eps, scale=scale)
        super().__init__(dim, gain="none", scale=scale)
        self.eps = eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return divide_by_rms(h, self.eps)


@register_norm("prmsnorm")
class PRMSNorm(AffineNorm):
    r"""Divide all features by the root mean square of the first few.

        y = scale * weight * x / (sqrt(mean(x[:k]^2)) + eps),  k = int(p * dim)

    At least one feature is measured, which is ours. A token whose first k features are 0 is divided
    by eps.

    Shape: x and y are (..., dim); weight is (dim,).

    Args:
        dim: size of the feature axis.
        p: the part of the features that is measured; 6.25 % is the paper's from memory.
        eps: outside the root, as in the paper's code.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0`` or `p` is not above 0 and at most 1.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    def __init__(
        self, dim: int, *, p: float = 0.0625, eps: float = 1e-8, scale: float = 1.0
    ) -> None:
        check_norm("prmsnorm", dim, p=p, eps=eps, scale=scale)
        super().__init__(dim, scale=scale)
        if p > 1:
            raise ValueError(f"prmsnorm.p is {p}; expected a part of the features, at most 1")
        self.count, self.eps = max(1, int(p * dim)), eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return divide_by_rms_and_eps(h, self.count, self.eps)


@register_norm("crmsnorm")
class CRMSNorm(AffineNorm):
    r"""RMSNorm of a zero-mean vector that is stored without its last feature.

        y = scale * x / sqrt((sum(x^2) + sum(x)^2) / (dim + 1) + eps)

    The feature left out is -sum(x). A stream whose writers all have zero mean over features may be
    stored one feature narrower; gains are folded into the linear layers before.

    Shape: x and y are (..., dim), dim the compressed width; no parameters.

    Args:
        dim: size of the feature axis, one less than the width it stands for.
        eps: inside the root.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", 2023, arXiv:2305.14858.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, scale: float = 1.0) -> None:
        check_norm("crmsnorm", dim, eps=eps, scale=scale)
        super().__init__(dim, gain="none", scale=scale)
        self.dim, self.eps = dim, eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        squares = h.pow(2).sum(-1, keepdim=True) + h.sum(-1, keepdim=True).pow(2)
        return h * torch.rsqrt(squares / (self.dim + 1) + self.eps)
