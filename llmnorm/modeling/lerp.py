"""nGPT's joint: a step from the stream towards the branch, on the unit sphere."""

from collections.abc import Callable
from typing import Any

import torch

from .residual import Residual, register_residual


@register_residual("lerp")
class Lerp(Residual):
    r"""Interpolate between the stream and the branch, feature by feature.

        s = entry(x);  y = out( s + first( post(branch(pre(s))) - s ) )

    With `first` a learned rate and `post`, `out` the projection to the unit sphere this is nGPT's
    update.

    Shape: x and y are (batch, seq, hidden).

    Source: Loshchilov et al., "nGPT", 2024, arXiv:2410.01131, equations 10 and 11.
    """

    def forward(
        self,
        x: torch.Tensor,
        block_input: torch.Tensor,
        branch: Callable[..., torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        s = self.entry(x)
        return self.out(s + self.first(self.post(branch(self.pre(s), **kwargs)) - s))
