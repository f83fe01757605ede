"""nGPT's gains: learned numbers that are stored on the scale of the weights beside them.

Adam moves every number by about the learning rate, whatever its size. A gain that should start at
`value` but move as fast as weights of size `stored` is therefore stored as a parameter that starts
at `stored`, and restored on use. `lerp.py` has nGPT's joint, `llmnorm/placements/ngpt.py` says
which gain stands where.

Source: Loshchilov et al., "nGPT", 2024, arXiv:2410.01131, section 2.5.
"""

import torch
from torch import nn
from transformers import initialization as init

from .operations import check_positive, compute_dtype, register_gain
from .unitnorm import unit


@register_gain("ngpt_gain")
class NGPTGain(nn.Module):
    r"""Multiply each feature by a learned number that is stored on another scale.

        y = g * x,  g = weight * value / stored

    Shape: x and y are (..., dim); weight is (dim,), initially `stored`.

    Args:
        dim: size of the feature axis.
        value: initial gain.
        stored: initial parameter.

    Raises:
        ValueError: if a number is not above 0.
    """

    def __init__(self, dim: int, *, value: float = 1.0, stored: float = 1.0) -> None:
        super().__init__()
        check_positive("value", value)
        check_positive("stored", stored)
        self.value, self.stored = float(value), float(stored)
        self.weight = nn.Parameter(torch.full((dim,), self.stored))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.stored)

    def gain(self, dtype: torch.dtype) -> torch.Tensor:
        """g, in `dtype`."""
        return self.weight.to(dtype) * (self.value / self.stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.gain(compute_dtype(x)) * x).to(x.dtype)


@register_gain("ngpt_rate")
class NGPTRate(NGPTGain):
    """The absolute value of such a gain, y = |g| * x: how far the stream steps, feature by feature.

    Shape: x and y are (..., dim); weight is (dim,), initially `stored`.
    """

    def gain(self, dtype: torch.dtype) -> torch.Tensor:
        return super().gain(dtype).abs()


@register_gain("ngpt_query")
class NGPTQuery(NGPTGain):
    r"""Bring each head's queries to length one and put the whole scale of the logits on them.

        y = head_dim * g^2 * q / max(|q|, eps)

    nGPT multiplies queries and keys by the same g and their product by sqrt(head_dim). With keys of
    length one, g^2 on the queries alone gives the same logits and the same gradient of g, also
    where several query heads share a key head. Attention divides by sqrt(head_dim), so head_dim
    stands here.

    Shape: q and y are (batch, heads, seq, head_dim); weight is (heads * head_dim,).

    Args:
        dim: head_dim.
        heads: query heads, each with its own gains.
        value: initial g.
        stored: initial parameter.
        eps: a query shorter than this is divided by it.

    Raises:
        ValueError: if a number is not above 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        value: float = 1.0,
        stored: float = 1.0,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(heads * dim, value=value, stored=stored)
        check_positive("eps", eps)
        self.head_dim, self.eps = dim, float(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x)
        gain = self.gain(dtype).view(-1, 1, self.head_dim)  # (heads, 1, head_dim)
        return (self.head_dim * gain.square() * unit(x.to(dtype), self.eps)).to(x.dtype)
