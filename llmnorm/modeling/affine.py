"""What the norms share: after its own formula, each multiplies by a gain and may add a bias.

Statistics and products are in float32 or higher, the result in the input's dtype. A constant of a
scheme is a Python float on the module, never a buffer: a buffer is wiped when a model is built on
the meta device. Read `rmsnorm.py` next, the norm to start from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .operations import check_positive, compute_dtype, register_norm


class AffineNorm(nn.Module):
    """Base of the norms: a subclass says what `normalized(x)` is, or has a forward of its own.

        y = scale * (gain * normalized(x) + bias)

    Shape: x and y are (..., dim); weight and bias are (dim,), a scalar weight is (1,).

    Args:
        dim: size of the feature axis.
        gain: `vector` (one weight a feature), `scalar` (one for all) or `none`.
        weight_init: initial gain.
        unit_offset: the gain is 1 + weight instead of weight.
        bias: whether there is a learned bias, initially 0.
        scale: constant multiplier on the output, after the product.
        scalars: further parameters of shape (1,) and their initial values.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        gain: str = "vector",
        weight_init: float = 1.0,
        unit_offset: bool = False,
        bias: bool = False,
        scale: float = 1.0,
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.unit_offset = scale, unit_offset
        for name, value in (scalars or {}).items():
            self.start(name, 1, value)
        sizes = {"vector": dim, "scalar": 1, "none": 0}
        self.start("weight", sizes[gain], weight_init - unit_offset)
        self.start("bias", dim if bias else 0, 0.0)

    def start(self, name: str, size: int, value: float) -> None:
        """Own a parameter of `size` elements, initially `value`; size 0 is None."""
        setattr(self, f"{name}_init", float(value))
        filled = torch.full((size,), float(value))
        self.register_parameter(name, nn.Parameter(filled) if size else None)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            init.constant_(parameter, getattr(self, f"{name}_init"))

    def normalized(self, h: torch.Tensor) -> torch.Tensor:
        """The norm's own formula, without gain, on features in float32 or higher."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.affine(self.normalized(x.to(compute_dtype(x))), x.dtype)

    def affine(self, h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """scale * (gain * h + bias), rounded once, to `dtype`."""
        precise = compute_dtype(h)
        y = self.gain(precise) * h
        if self.bias is not None:
            y = y + self.scale * self.bias.to(precise)
        return y.to(dtype)

    def gain(self, dtype: torch.dtype) -> torch.Tensor | float:
        """What the normalized features are multiplied by, `scale` included."""
        if self.weight is None:
            return self.scale
        weight = self.weight.to(dtype)
        return self.scale * (1 + weight if self.unit_offset else weight)


@register_norm("none")
class NoNorm(nn.Module):
    """Leave the features as they are: y = scale * x, for residual control without norms.

    Args:
        dim: size of the feature axis; any.
        scale: constant multiplier.
    """

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        check_norm("none", dim, scale=scale)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def check_norm(name: str, dim: int, **above_zero: float) -> None:
    """Raise ValueError for a width below 1, or an option that is no number above 0."""
    if dim < 1:
        raise ValueError(f"a norm over {dim} features is impossible; expected at least 1")
    for option, value in above_zero.items():
        check_positive(f"{name}.{option}", value)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the known words."""
    if value not in known:
        words = ", ".join(repr(word) for word in known[:-1])
        raise ValueError(f"{name} is {value!r}; expected {words} or {known[-1]!r}")


def given_at(
    name: str, options: Mapping[str, Any], kind: str, sites: tuple[str, ...]
) -> Any | None:
    """An option's value at a site: the same everywhere, or a mapping of sites; None if not given.

    Raises:
        ValueError: for a site that the option does not have.
    """
    given = options.get(name)
    if not isinstance(given, Mapping):
        return given
    unknown = sorted(set(given) - set(sites), key=str)
    if unknown:
        raise ValueError(f"{name} has no site {unknown[0]!r}; its sites: {', '.join(sites)}")
    return given.get(kind)


def rmsnorm_like(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the rmsnorm that stands in for a norm with these: the same eps and scale."""
    return {"op": "rmsnorm", **{n: options[n] for n in ("eps", "scale") if n in options}}
