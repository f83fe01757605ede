"""Norms by running statistics of each feature: PowerNorm and Unified Normalization.

They are not in the table of norms. In training their statistics pool over positions and sequences,
so a token sees later ones: a language model trained with them leaks the future, and a loss measured
in training is not a loss. They are here as tested operators, for comparison with the papers' code
and for their one advantage: in evaluation they are a fixed affine map, which `fold` returns.
Statistics are those of one process. The formulas are written from the papers' description of them.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# Of the per-token scaling that precedes PowerNorm; fixed, whatever the norm's own eps.
_GROUP_EPS = 1e-5


class PowerNorm(nn.Module):
    r"""Divide each feature by the root of its mean square over the tokens seen so far.

        u = x / sqrt(mean of x^2 over the feature's group + 1e-5)
        y = weight * u / sqrt(m + eps) + bias

    m is the batch's mean of u^2 per feature, v, for `warmup_steps` steps, then the running mean
    phi before this step's update. phi is the plain average of v before the end of the warm-up, and
    after each step phi <- forward_momentum * phi + (1 - forward_momentum) * v.

    The gradient takes m for a constant and corrects for that with a running sum G, z = u / sqrt(m):
    h = g - (1 - backward_momentum) * G * z;  G <- G + mean(h * z);  du = h / sqrt(v + eps).

    Shape: x and y are (..., dim); pad_mask is (...), True at padding, which v leaves out.

    Args:
        dim: size of the feature axis.
        eps: added to m and v.
        groups: features are cut into this many groups for u.
        warmup_steps: steps with batch statistics.
        forward_momentum: of phi.
        backward_momentum: of the correction.

    Raises:
        ValueError: if the groups do not divide `dim`.

    Source: Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020,
    arXiv:2003.07845; the details that the paper leaves open as in its code.
    """

    running_square: torch.Tensor
    gradient_sum: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        warmup_steps: int = 10000,
        forward_momentum: float = 0.9,
        backward_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if groups < 1 or dim < 1 or dim % groups:
            raise ValueError(f"PowerNorm: {groups} groups do not divide a width of {dim}")
        self.eps, self.groups, self.warmup_steps = eps, groups, warmup_steps
        self.forward_momentum, self.backward_momentum = forward_momentum, backward_momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_square", torch.ones(dim))
        self.register_buffer("gradient_sum", torch.zeros(dim))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        u = self.group_scaled(x)
        if not self.training:
            scale, bias = self.fold()
            return scale * u + bias
        square = _mean_square(u, pad_mask)
        self.steps += 1
        step = int(self.steps)
        used = square if step <= self.warmup_steps else self.running_square.clone()
        self._update(step, square)
        z = _Power.apply(
            u,
            torch.rsqrt(used + self.eps),
            torch.rsqrt(square + self.eps),
            self.gradient_sum,
            1 - self.backward_momentum,
        )
        return self.weight * z + self.bias

    def group_scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x with each group of features of each token divided by its root mean square."""
        x_grouped = x.unflatten(-1, (self.groups, -1))
        mean = x_grouped.pow(2).mean(-1, keepdim=True)
        return (x_grouped * torch.rsqrt(mean + _GROUP_EPS)).flatten(-2)

    @torch.no_grad()
    def _update(self, step: int, square: torch.Tensor) -> None:
        if step < self.warmup_steps:
            self.running_square.lerp_(square, 1 / step)
        self.running_square.lerp_(square, 1 - self.forward_momentum)

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, bias), each (dim,): in evaluation y = scale * group_scaled(x) + bias."""
        return self.weight * torch.rsqrt(self.running_square + self.eps), self.bias


class _Power(torch.autograd.Function):
    """z = u * inverse_used, with PowerNorm's gradient, which adds to `gradient_sum`."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        inverse_used: torch.Tensor,
        inverse_batch: torch.Tensor,
        gradient_sum: torch.Tensor,
        rate: float,
    ) -> torch.Tensor:
        z = u * inverse_used
        ctx.save_for_backward(z, inverse_batch)
        ctx.gradient_sum, ctx.rate = gradient_sum, rate
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, inverse_batch = ctx.saved_tensors
        h = g - ctx.rate * ctx.gradient_sum * z
        ctx.gradient_sum += _over_positions(h * z)
        return h * inverse_batch, None, None, None, None


class UnifiedNorm(nn.Module):
    r"""Divide each feature by the geometric mean of its mean squares in the last few steps.

        y = weight * x / sqrt(s + eps) + bias

    v is the batch's mean of x^2 per feature. s is v while the step is at most `window` or below
    `warmup_steps`, then the geometric mean of the last `window` values of v. In evaluation s is
    the running mean of s.

    Filtering: if some feature's arithmetic mean over the window exceeds its geometric mean by more
    than `window` times the variance of the window's roots before this step, the step is skipped:
    v enters the window as the running mean, and s is v. With a window of 1 every step is so.

    The gradient, z = x / sqrt(s + eps), is multiplied by the ratio of sqrt(s + eps) to its running
    mean, within [1/5, 5], after step 1000 and the warm-up; its mean of g * z over tokens is taken
    over the last `backward_window` steps, then as a running mean, and subtracted times z.

    Shape: x and y are (..., dim); pad_mask is (...), True at padding, which v leaves out.

    Args:
        dim: size of the feature axis.
        eps: added to s.
        momentum: of the running means.
        window: steps in the geometric mean.
        backward_window: steps in the mean of the gradient's correction; None for `window`.
        warmup_steps: steps with batch statistics.
        filtering: whether steps with outliers are skipped; off in the paper's language tasks.

    Raises:
        ValueError: if a window is below 1.

    Source: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM
    MM 2022, arXiv:2208.01313; the details that the paper leaves open as in its code.
    """

    running_square: torch.Tensor
    running_gradient: torch.Tensor
    squares: torch.Tensor
    gradients: torch.Tensor
    steps: torch.Tensor
    skipped: torch.Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.9,
        window: int = 4,
        backward_window: int | None = None,
        warmup_steps: int = 4000,
        filtering: bool = False,
    ) -> None:
        super().__init__()
        backward_window = window if backward_window is None else backward_window
        if dim < 1 or window < 1 or backward_window < 1:
            raise ValueError(
                f"UnifiedNorm: dim {dim}, windows {window} and {backward_window}; "
                "expected at least 1"
            )
        self.eps, self.momentum = eps, momentum
        self.warmup_steps, self.filtering = warmup_steps, filtering
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_square", torch.ones(dim))
        self.register_buffer("running_gradient", torch.zeros(dim))
        self.register_buffer("squares", torch.zeros(window, dim))
        self.register_buffer("gradients", torch.zeros(backward_window, dim))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.register_buffer("skipped", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training:
            scale, bias = self.fold()
            return scale * x + bias
        self.steps += 1
        step = int(self.steps)
        square = _mean_square(x, pad_mask)
        skip = self._remember(step, square)
        if not (step <= len(self.squares) or step < self.warmup_steps or skip):
            square = self.squares.log().mean(0).exp()
        ratio = torch.sqrt((square + self.eps) / (self.running_square + self.eps))
        late = step > max(1000, self.warmup_steps) and not skip
        ratio = ratio.clamp(1 / 5, 5) if late else torch.ones_like(ratio)
        with torch.no_grad():
            self.running_square.lerp_(square, 1 - self.momentum)
        z = _Unified.apply(x, torch.rsqrt(square + self.eps), self, step, skip)
        return _Stretch.apply(self.weight * z, ratio) + self.bias

    @torch.no_grad()
    def _remember(self, step: int, square: torch.Tensor) -> bool:
        """Put this step's mean square in the window; whether the step is to be skipped."""
        window, slot = len(self.squares), step % len(self.squares)
        spread = self.squares.sqrt().var()
        self.squares[slot] = square
        if not self.filtering or step < self.warmup_steps:
            return window <= 1
        excess = self.squares.mean(0) - self.squares.log().mean(0).exp()
        if not (excess > spread * window).any():
            return window <= 1
        self.squares[slot] = self.running_square
        self.skipped += 1
        return True

    @torch.no_grad()
    def correct(self, mean: torch.Tensor, step: int, skip: bool) -> torch.Tensor:
        """Enter this step's mean of g * z; what the gradient subtracts, times z."""
        self.gradients[step % len(self.gradients)] = self.running_gradient if skip else mean
        if not (step <= len(self.gradients) or step < self.warmup_steps or skip):
            mean = self.gradients.mean(0)
        self.running_gradient.lerp_(mean, 1 - self.momentum)
        return mean if skip else self.running_gradient

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, bias), each (dim,): in evaluation y = scale * x + bias."""
        return self.weight * torch.rsqrt(self.running_square + self.eps), self.bias


class _Unified(torch.autograd.Function):
    """z = x * inverse, with Unified Normalization's gradient, which updates the norm's means."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, inverse: torch.Tensor, norm: UnifiedNorm, step: int, skip: bool
    ) -> torch.Tensor:
        z = x * inverse
        ctx.save_for_backward(z, inverse)
        ctx.norm, ctx.step, ctx.skip = norm, step, skip
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, inverse = ctx.saved_tensors
        correction = ctx.norm.correct(_over_positions(g * z), ctx.step, ctx.skip)
        return (g - correction * z) * inverse, None, None, None, None


class _Stretch(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `ratio`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ratio)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return g * ctx.saved_tensors[0], None


def _over_positions(values: torch.Tensor) -> torch.Tensor:
    """Mean over all axes but the last."""
    return values.flatten(0, -2).mean(0)


@torch.no_grad()
def _mean_square(x: torch.Tensor, pad_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of x^2 per feature over the positions that are no padding."""
    return _over_positions((x if pad_mask is None else x[~pad_mask]).pow(2))
