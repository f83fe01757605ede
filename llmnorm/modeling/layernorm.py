"""LayerNorm, with and without its affine part."""

import torch

from .affine import AffineNorm, check_norm
from .operations import register_norm
from .rmsnorm import divide_by_rms


@register_norm("layernorm")
class LayerNorm(AffineNorm):
    r"""Subtract the mean of the features and divide by their standard deviation.

        y = scale * (weight * (x - mean(x)) / sqrt(var(x) + eps) + bias), biased variance

    Shape: x and y are (..., dim); weight and bias are (dim,).

    Args:
        dim: size of the feature axis.
        eps: added to the variance.
        elementwise_affine: False leaves weight and bias out.
        bias: False leaves the bias out.
        weight_init: initial gain.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``, or for a `weight_init` without a weight.

    Source: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        weight_init: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        check_norm("layernorm", dim, eps=eps, scale=scale)
        if weight_init != 1.0 and not elementwise_affine:
            raise ValueError("layernorm.elementwise_affine is False: there is no weight to start")
        super().__init__(
            dim,
            gain="vector" if elementwise_affine else "none",
            weight_init=weight_init,
            bias=elementwise_affine and bias,
            scale=scale,
        )
        self.eps = eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return divide_by_rms(h - h.mean(-1, keepdim=True), self.eps)
