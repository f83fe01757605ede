"""The gains: multiplication by a constant or by learned numbers, without any statistic."""

import torch
from torch import nn
from transformers import initialization as init

from .operations import register_gain


@register_gain("constant")
class Constant(nn.Module):
    """Multiply by a fixed number: y = value * x. No parameters.

    Args:
        dim: size of the feature axis; any.
        value: the number, a Python float.
    """

    def __init__(self, dim: int, *, value: float) -> None:
        super().__init__()
        self.value = float(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value * x


@register_gain("gain")
class Gain(nn.Module):
    """Multiply each feature by a learned number: y = weight * x.

    Shape: x and y are (..., dim); weight is (dim,), initially `value`.
    """

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__()
        self.value = float(value)
        self.weight = nn.Parameter(torch.full((dim,), self.value))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).to(x.dtype)


@register_gain("head_gain")
class HeadGain(nn.Module):
    """Multiply each head's output by a learned number (NormFormer's HeadScale).

    Shape: x and y are (..., heads * head_dim); weight is (heads,), initially `value`.

    Raises:
        ValueError: if the heads do not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int, value: float = 1.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"head_gain: {heads} heads do not divide a width of {dim}")
        self.heads, self.value = heads, float(value)
        self.weight = nn.Parameter(torch.full((heads,), self.value))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_head = self.weight[:, None] * x.unflatten(-1, (self.heads, -1))
        return y_head.flatten(-2).to(x.dtype)


class EmbeddingScale(nn.Module):
    """Multiply the embedding by one learned scalar; weight is (1,), initially `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.full((1,), value))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.to(x.dtype) * x
