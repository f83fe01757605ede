"""FixedStd: a norm that is taken out of a trained model: from one step on it divides by a constant.

No scheme to train from scratch: `llmnorm convert --to fixed_std` puts it where a trained model has
layernorms or rmsnorms, each with a step of its own.
"""

import torch
from torch import nn

from .affine import AffineNorm, check_norm
from .operations import compute_dtype, register_gain


@register_gain("fixed_std")
class FixedStd(AffineNorm):
    r"""Divide by each token's standard deviation first, and by one number in the end.

        y = scale * (weight * h / s + bias),  h = x - mean(x), or x without `centre`

    Up to optimizer step `remove_step`, s is the token's own sqrt(mean(h^2) + eps), and its mean
    over tokens is averaged over steps: apart for position 0 of a row, which is much larger in
    trained models, and for all others. After it, s is that average, frozen. After `uniform_step`
    position 0 has the number of the others: what is left is a matrix, and a gain without `centre`.

    The first of several positions is position 0; a single one (cached generation) is not. So until
    `uniform_step` a text's very first token must come with others.

    Shape: x and y are (batch, seq, ..., dim), (seq, dim) or (dim,); weight and bias are (dim,).
    std, std_first (of position 0) and removed are (1,) and take no gradient; the averages are in
    float32 or higher while they move.

    Args:
        dim: size of the feature axis.
        eps: inside the root.
        centre: subtract the mean of the features, as a layernorm does; it stays.
        bias: whether there is a bias.
        remove_step: optimizer steps with the token's own standard deviation.
        uniform_step: from this step on position 0 is treated as the others; at least `remove_step`.
        momentum: weight of the past in the averages.
        penalty: in training, adds `penalty` times (s - std of the others)^2 to the loss of each
            token, s its own standard deviation: tokens of one size lose less by the removal.
        scale: constant multiplier on the output.

    Raises:
        ValueError: if ``dim < 1``, ``eps <= 0``, a step is not whole and above 0, `uniform_step` is
            before `remove_step`, `momentum` is not between 0 and 1, or ``penalty < 0``.

    Source: "Transformers Don't Need LayerNorm at Inference Time", 2025, arXiv:2507.02559, after
    Heimersheim, 2024, arXiv:2409.13710. There the penalty's target is the mean of the batch; here
    it is the average, so that a split into micro-batches changes nothing.
    """

    weight: nn.Parameter
    std: nn.Parameter
    std_first: nn.Parameter
    removed: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        centre: bool = False,
        bias: bool = False,
        remove_step: int = 1,
        uniform_step: int = 1,
        momentum: float = 0.9,
        penalty: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        above_zero = {"remove_step": remove_step, "uniform_step": uniform_step}
        check_norm("fixed_std", dim, eps=eps, momentum=momentum, scale=scale, **above_zero)
        for name, step in above_zero.items():
            if step != int(step):
                raise ValueError(f"fixed_std.{name} is {step!r}; expected a whole number")
        if uniform_step < remove_step:
            raise ValueError(
                f"fixed_std.uniform_step is {uniform_step}, before remove_step={remove_step}"
            )
        if momentum >= 1 or penalty < 0:
            raise ValueError(
                f"fixed_std has momentum {momentum!r} and penalty {penalty!r}; expected a "
                "momentum below 1 and a penalty of at least 0"
            )
        super().__init__(dim, bias=bias, scale=scale)
        for name in ("std", "std_first", "removed"):
            self.start(name, 1, 0.0)
            self.get_parameter(name).requires_grad_(False)
        self.eps, self.centre, self.momentum, self.penalty = eps, centre, momentum, penalty
        self.remove_step, self.uniform_step = int(remove_step), int(uniform_step)
        self.rows: torch.Tensor | None = None  # (batch,): which count; None: all
        self.seen: torch.Tensor | None = None  # this step's sums and numbers of tokens, (4,)
        self.penalty_sum: torch.Tensor | None = None  # of the last forward, for the objective

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(compute_dtype(x))
        if self.centre:
            h = h - h.mean(-1, keepdim=True)
        std = (h.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        first = _is_first(std)
        if self.training:
            self._see(std, first)
        fixed = torch.where(first, self.std_first, self.std).to(h.dtype)
        fixed = fixed.clamp_min(torch.finfo(h.dtype).tiny)  # before anything was averaged it is 0
        return self.affine(h / torch.where(self.removed > 0, fixed, std), x.dtype)

    def _see(self, std: torch.Tensor, first: torch.Tensor) -> None:
        """Add up a forward; one that recomputes activations adds sums and numbers once more."""
        counted = torch.ones_like(std)
        if self.rows is not None:
            counted = counted * self.rows.view(-1, *[1] * (std.ndim - 1))
        if self.penalty:
            far = torch.where(self.std > 0, std - self.std, torch.zeros_like(std))
            self.penalty_sum = self.penalty * (far.pow(2) * counted).sum()
        sums = [
            part
            for chosen in (counted * first, counted * ~first)
            for part in ((std.detach() * chosen).sum(), chosen.sum())
        ]
        now = torch.stack(sums)
        self.seen = now if self.seen is None else self.seen + now

    def before(self, rows: torch.Tensor, *, first: bool) -> None:
        """Meet a micro-batch, the `first` of a step or not; `rows` (batch,) says which count."""
        self.rows = rows
        if first:
            self.seen = torch.zeros(4, device=rows.device)

    def measured(self, step: int) -> torch.Tensor | None:
        """What `after_step` wants averaged over the ranks up to `remove_step`: the sums (4,).

        Raises:
            ValueError: if there were none in such a step.
        """
        if step > self.remove_step:
            return None
        if self.seen is None:
            raise ValueError("fixed_std saw no forward in training mode before this step")
        return self.seen

    @torch.no_grad()
    def after_step(self, step: int, means: torch.Tensor | None) -> None:
        """Move the averages, and freeze them, after optimizer step number `step`, on the device.

        Args:
            step: optimizer steps done, this one included.
            means: what `measured` gave, averaged over the ranks.
        """
        averages = (self.std_first, self.std)
        if means is not None:
            for average, (total, count) in zip(averages, means.view(2, 2), strict=True):
                average.data = average.data.to(compute_dtype(average))
                now = (total / count.clamp_min(1e-9)).to(average.dtype)
                begun = torch.where(average > 0, average, torch.zeros_like(average) + now)
                moved = begun.lerp(now, 1 - self.momentum)
                average.copy_(torch.where(self.removed > 0, average, moved))
        if step == self.remove_step:
            self.removed.fill_(1.0)
            for average in averages:
                average.data = average.data.to(self.removed.dtype)
        if step >= self.uniform_step:
            self.std_first.copy_(self.std)
        self.rows = self.seen = self.penalty_sum = None


def _is_first(std: torch.Tensor) -> torch.Tensor:
    """Which entries are position 0 of several, (1, seq, 1, ...) or (seq, 1) or (1,)."""
    axis = 0 if std.ndim <= 2 else 1
    positions = std.shape[axis] if std.ndim > 1 else 1
    shape = [1] * std.ndim
    shape[axis] = positions
    index = torch.arange(positions, device=std.device)
    return ((index == 0) & (positions > 1)).view(shape)
