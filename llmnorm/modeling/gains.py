"""The gains: multiplication by a constant or by learned numbers, without any statistic."""

import math

import torch
from torch import nn
from torch.nn.functional import silu
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


class LearnedGain(nn.Module):
    """Base of the learned gains: y = weight * x, weight of `size` numbers, initially `value`."""

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.value = float(value)
        self.weight = nn.Parameter(torch.full((size,), self.value))

    def reset_parameters(self) -> None:
        init.constant_(self.weight, self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).to(x.dtype)


@register_gain("gain")
class Gain(LearnedGain):
    """Multiply each feature by a learned number: y = weight * x.

    Shape: x and y are (..., dim); weight is (dim,), initially `value`.
    """

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__(dim, value)


@register_gain("head_gain")
class HeadGain(LearnedGain):
    """Multiply each head's output by a learned number (NormFormer's HeadScale).

    Shape: x and y are (..., heads * head_dim); weight is (heads,), initially `value`.

    Raises:
        ValueError: if the heads do not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int, value: float = 1.0) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(f"head_gain: {heads} heads do not divide a width of {dim}")
        super().__init__(heads, value)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_head = self.weight[:, None] * x.unflatten(-1, (self.heads, -1))
        return y_head.flatten(-2).to(x.dtype)


@register_gain("gpas")
class GPASGate(nn.Module):
    r"""Shrink the stream by a learned factor that its gradient does not see.

        y = scale * (x - silu(gate) * stop_gradient(x))

    The value is scale * (1 - silu(gate)) * x, the gradient with respect to x only `scale`; that of
    the gate is -scale * silu'(gate) * <dy, x>. Beyond gate 1.278 the factor is negative.

    Shape: x and y are (..., dim); gate is (1,), initially 0, where y = scale * x.

    Args:
        dim: size of the feature axis; any.
        scale: constant multiplier.

    Source: Chen et al., "GPAS: Accelerating Convergence of LLM Pretraining via
    Gradient-Preserving Activation Scaling", NeurIPS 2025, arXiv:2506.22049.
    """

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = float(scale)
        self.gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        init.zeros_(self.gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * (x - silu(self.gate) * x.detach())).to(x.dtype)


@register_gain("scalar_gain")
class ScalarGain(LearnedGain):
    """Multiply all features by one learned number: y = weight * x; weight is (1,).

    Args:
        dim: size of the feature axis; any.
        value: where the number starts.
    """

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__(1, value)


@register_gain("scalar_bias")
class ScalarBias(nn.Module):
    """Add one learned number to all features: y = x + bias; bias is (1,), initially 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bias).to(x.dtype)


@register_gain("profiled_gain")
class ProfiledGain(LearnedGain):
    """A `gain` whose start is measured on the scheme's own initial model (Admin).

    `llmnorm.calibration` measures `value`. Until then there is nothing to start from, so a model
    made without it, as by `AutoModelForCausalLM.from_config`, is refused where its weights are
    drawn.

    Raises:
        ValueError: if ``value < 0``; in `reset_parameters`, if it was never measured.
    """

    def __init__(self, dim: int, *, value: float = 0.0) -> None:
        if value < 0:
            raise ValueError(
                f"profiled_gain.value is {value!r}; expected above 0, or 0: unmeasured"
            )
        super().__init__(dim, value or math.nan)

    def reset_parameters(self) -> None:
        loaded = getattr(self.weight, "_is_hf_initialized", False)
        if math.isnan(self.value) and not (self.weight.is_meta or loaded):
            raise ValueError(
                "profiled_gain has no value to start from; llmnorm.build_model measures it"
            )
        super().reset_parameters()


class EmbeddingScale(LearnedGain):
    """Multiply the embedding by one learned scalar; weight is (1,), initially `value`."""

    def __init__(self, value: float) -> None:
        super().__init__(1, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.to(x.dtype) * x
