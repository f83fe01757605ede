"""Norms that divide by the length |x| of the features: L2 norm, ScaleNorm, FixNorm."""

import torch

from .affine import AffineNorm, check_choice, check_norm
from .operations import register_norm


def unit(h: torch.Tensor, eps: float) -> torch.Tensor:
    """h / max(|h|, eps), over the last axis; the gradient at 0 is that of h / eps."""
    return h / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(eps)


@register_norm("l2norm")
class L2Norm(AffineNorm):
    r"""Give the features a fixed length.

        y = scale * gain * length * x / max(|x|, eps)

    On queries and keys the logits are the cosine times both gains and lengths and attention's
    1/sqrt(head_dim); with scalar gains that product is QKNorm's learned factor g, which there
    starts at log2(L^2 - L), L the 97.5th percentile of the training sequences' lengths:

        qk_norm: {layout: per_head, op: l2norm, gain: scalar, weight_init: sqrt(g * sqrt(head_dim))}

    starts there too, the root written out as a number. The paper's one g is held as a product of
    two numbers here, so that Adam's path is another. `sqrt_dim` with gain vector is the RMSNorm of
    x-transformers; without a gain, `one` is nGPT's unit norm and `sqrt_dim` is FixNorm.

    Shape: x and y are (..., dim); weight is (dim,), a scalar weight is (1,).

    Args:
        dim: size of the feature axis.
        eps: a token shorter than this is divided by it.
        length: `one`, or `sqrt_dim`: the root of the number of features normalized together, so
            that the output has RMS 1.
        gain: `none`, `scalar` or `vector`.
        weight_init: initial gain.
        groups: the features are cut into this many groups, each normalized by itself.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0``, a word is unknown, the groups do not divide
            `dim`, or for a `weight_init` without a gain.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020, arXiv:2010.04245;
    groups, lengths and gains as in x-transformers.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-12,
        length: str = "one",
        gain: str = "none",
        weight_init: float = 1.0,
        groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        check_norm("l2norm", dim, eps=eps, groups=groups, scale=scale)
        check_choice("l2norm.length", length, ("one", "sqrt_dim"))
        check_choice("l2norm.gain", gain, ("none", "scalar", "vector"))
        if groups != int(groups) or dim % groups:
            raise ValueError(f"l2norm: {groups} groups do not divide a width of {dim}")
        if weight_init != 1.0 and gain == "none":
            raise ValueError("l2norm.gain is 'none': there is no weight to start")
        super().__init__(dim, gain=gain, weight_init=weight_init, scale=scale)
        self.eps, self.groups = eps, int(groups)
        self.length = (dim / groups) ** 0.5 if length == "sqrt_dim" else 1.0

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        h_grouped = h.unflatten(-1, (self.groups, -1))
        return self.length * unit(h_grouped, self.eps).flatten(-2)


@register_norm("scalenorm")
class ScaleNorm(AffineNorm):
    r"""Give the features one learned length: RMSNorm with the scalar gain weight / sqrt(dim).

        y = scale * weight * x / max(|x|, eps)

    Shape: x and y are (..., dim); weight is (1,), initially sqrt(dim).

    Args:
        dim: size of the feature axis.
        eps: a token shorter than this is divided by it.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: Nguyen and Salazar, "Transformers without Tears", 2019, arXiv:1910.05895.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, scale: float = 1.0) -> None:
        check_norm("scalenorm", dim, eps=eps, scale=scale)
        super().__init__(dim, gain="scalar", weight_init=dim**0.5, scale=scale)
        self.eps = eps

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return unit(h, self.eps)


@register_norm("fixnorm")
class FixNorm(AffineNorm):
    r"""Give the features the length sqrt(dim): the L2 norm for embeddings, where it was proposed.

        y = scale * sqrt(dim) * x / max(|x|, eps)

    The paper uses the same unit rows as output matrix; in a slot only what passes through it is
    normalized. Bake it into the table after training. The paper's code draws the table from
    U(-0.01, 0.01), ours is normal with the usual std: directions alone matter to the function.

    Shape: x and y are (..., dim); no parameters.

    Args:
        dim: size of the feature axis.
        eps: a token shorter than this is divided by it.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1`` or ``eps <= 0``.

    Source: Nguyen and Salazar, "Transformers without Tears", 2019, arXiv:1910.05895, after Nguyen
    and Chiang, 2018, arXiv:1710.01329.
    """

    def __init__(self, dim: int, *, eps: float = 1e-12, scale: float = 1.0) -> None:
        check_norm("fixnorm", dim, eps=eps, scale=scale)
        super().__init__(dim, gain="none", scale=scale)
        self.eps, self.length = eps, dim**0.5

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        return self.length * unit(h, self.eps)
