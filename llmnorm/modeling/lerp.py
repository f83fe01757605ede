"""nGPT's joint: a step from the stream towards the branch, on the unit sphere."""

import torch

from .residual import RESIDUAL_SLOTS, Residual, register_residual


@register_residual("lerp")
class Lerp(Residual):
    r"""Interpolate between the stream and the branch, feature by feature.

        s = entry(x);  c = skip(s);  y = out( c + first( post(branch(pre(s))) - c ) )

    where the spec may let `pre` or `skip` take the block's input in place of s. With `first` a
    learned rate and `post`, `out` the projection to the unit sphere this is nGPT's update.

    Shape: x, block_input and y are (batch, seq, hidden).

    Source: Loshchilov et al., "nGPT", 2024, arXiv:2410.01131, equations 10 and 11.
    """

    slots = (*RESIDUAL_SLOTS, "first")

    def join(self, carried: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return carried + self.first(f - carried)
