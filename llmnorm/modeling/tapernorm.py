"""TaperNorm: an RMSNorm that turns into a fixed multiplication while the model trains."""

import math
from typing import Any

import torch
from torch import nn

from .affine import AffineNorm, check_choice, check_norm, rmsnorm_like
from .operations import check_positive, compute_dtype, register_norm


def _at_site(options: dict[str, Any], kind: str, hidden_size: int) -> dict[str, Any]:
    """The final norm stays an rmsnorm unless `final` is `taper`."""
    final = options.pop("final", "keep")
    check_choice("tapernorm.final", final, ("keep", "taper"))
    return rmsnorm_like(options) if kind == "final" and final == "keep" else options


@register_norm("tapernorm")
class TaperNorm(AffineNorm):
    r"""Normalize first, and fade to a fixed gain that folds into the next linear layer.

        y = scale * (g * weight * x / r + (1 - g) * c * taper_weight * x)
        r = sqrt(mean(x^2) + eps)

    `after_step` moves what no gradient moves. For `warmup_steps` the gate g is 1 and
    E[|x weight|^2 / r] and E[|x weight|^2] over a step's tokens are averaged. Then c becomes their
    quotient (the least-squares fit of the norm by a constant), taper_weight a copy of weight, and g
    goes to 0 along a half cosine of `taper_steps`. The gate never rises: a model that starts from a
    tapered one keeps its g, c and taper_weight, until the cosine is below that g.

    Shape: x and y are (..., dim); weight and taper_weight are (dim,); gate (g), c and the two
    averages are (1,) and take no gradient. In the warm-up the averages are in float32 or higher
    whatever the model is in: bfloat16 would lose small changes. taper_weight has a zero gradient
    while g is 1, weight one once g is 0.

    Args:
        dim: size of the feature axis.
        eps: inside the root.
        warmup_steps: optimizer steps with g at 1; the paper's schedule is not at hand, so this and
            the next two defaults are ours.
        taper_steps: optimizer steps from g = 1 to g = 0.
        momentum: weight of the past in the averages.
        scale: constant multiplier on the output.
        final: in a config alone: `keep` (the paper's Internal, our default) leaves the final norm
            an rmsnorm; `taper` tapers it too (All; that variant's auxiliary loss on r of the final
            norm is not implemented).

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0``, a number of steps is not whole and above 0, or
            `momentum` is not between 0 and 1.

    Source: TaperNorm, 2026, arXiv:2602.10408.
    """

    options_at = staticmethod(_at_site)
    config_options = ("final",)
    weight: nn.Parameter
    taper_weight: nn.Parameter
    gate: nn.Parameter
    c: nn.Parameter
    mean_over_rms: nn.Parameter
    mean_square: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        warmup_steps: int = 1000,
        taper_steps: int = 1000,
        momentum: float = 0.99,
        scale: float = 1.0,
    ) -> None:
        check_norm("tapernorm", dim, eps=eps, momentum=momentum, scale=scale)
        for name, steps in (("warmup_steps", warmup_steps), ("taper_steps", taper_steps)):
            check_positive(f"tapernorm.{name}", steps)
            if steps != int(steps):
                raise ValueError(f"tapernorm.{name} is {steps!r}; expected a whole number")
        if momentum >= 1:
            raise ValueError(f"tapernorm.momentum is {momentum!r}; expected below 1")
        super().__init__(dim, scale=scale)
        self.start("taper_weight", dim, 1.0)
        for name, value in {
            "gate": 1.0,
            "c": 1.0,
            "mean_over_rms": 0.0,
            "mean_square": 0.0,
        }.items():
            self.start(name, 1, value)
            self.get_parameter(name).requires_grad_(False)
        self.eps, self.momentum = eps, momentum
        self.warmup_steps, self.taper_steps = int(warmup_steps), int(taper_steps)
        self.rows: torch.Tensor | None = None  # (batch,): which count; None: all
        self.seen: torch.Tensor | None = None  # this step's two sums and number of tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(compute_dtype(x))
        inverse_rms = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        weighted = self.weight * h
        if self.training:
            self._see(weighted.detach(), inverse_rms.detach())
        tapered = self.c * self.taper_weight * h
        return (self.scale * (self.gate * weighted * inverse_rms + (1 - self.gate) * tapered)).to(
            x.dtype
        )

    def _see(self, weighted: torch.Tensor, inverse_rms: torch.Tensor) -> None:
        """Add up a forward; one that recomputes activations adds sums and number once more."""
        squares = weighted.pow(2).sum(-1, keepdim=True)
        counted = torch.ones_like(squares)
        if self.rows is not None:
            counted = counted * self.rows.view(-1, *[1] * (squares.ndim - 1))
        parts = (squares * inverse_rms * counted, squares * counted, counted)
        sums = torch.stack([part.sum() for part in parts])
        self.seen = sums if self.seen is None else self.seen + sums

    def before(self, rows: torch.Tensor, *, first: bool) -> None:
        """Meet a micro-batch, the `first` of a step or not; `rows` (batch,) says which count."""
        self.rows = rows
        if first:
            self.seen = torch.zeros(3, device=rows.device)

    def measured(self, step: int) -> torch.Tensor | None:
        """What `after_step` wants averaged over the ranks in the warm-up: the step's sums (3,).

        Raises:
            ValueError: if there was none in a step of the warm-up.
        """
        if step > self.warmup_steps:
            return None
        if self.seen is None:
            raise ValueError("tapernorm saw no forward in training mode before this step")
        return self.seen

    @torch.no_grad()
    def after_step(self, step: int, means: torch.Tensor | None) -> None:
        """Move gate, c and the averages after optimizer step number `step`, all on the device.

        Args:
            step: optimizer steps done, this one included.
            means: what `measured` gave, averaged over the ranks.
        """
        averages = (self.mean_over_rms, self.mean_square)
        if means is not None:
            for average, now in zip(averages, means[:2] / means[2], strict=True):
                average.data = average.data.to(compute_dtype(average))
                average.lerp_(now.to(average.dtype), 1 - self.momentum)
        if step == self.warmup_steps:
            whole = self.gate == 1
            fitted = (self.mean_over_rms / self.mean_square).to(self.c.dtype)
            self.c.copy_(torch.where(whole, fitted, self.c))
            self.taper_weight.copy_(torch.where(whole, self.weight, self.taper_weight))
            for average in averages:
                average.data = average.data.to(self.gate.dtype)
        done = min(max(step - self.warmup_steps, 0) / self.taper_steps, 1.0)
        self.gate.clamp_(max=(1 + math.cos(math.pi * done)) / 2 if done < 1 else 0.0)
        self.rows = self.seen = None

    @torch.no_grad()
    def fold(self) -> torch.Tensor:
        """The gain (dim,) that the norm has become: multiply the columns of the next layers by it.

        Raises:
            ValueError: while the gate is not 0.
        """
        whole: Any = self.gate
        gate = float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
        if gate != 0:
            raise ValueError(
                f"tapernorm's gate is {gate:.4g}; it folds at 0, after "
                f"{self.warmup_steps + self.taper_steps} steps"
            )
        return self.scale * self.c * self.taper_weight
