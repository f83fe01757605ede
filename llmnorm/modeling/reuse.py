"""Full BHyT's joint: the mlp's norm does not measure its input but reuses the block's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .operations import compute_dtype
from .residual import RESIDUAL_SLOTS, Residual, ResidualSpec, register_residual


@register_residual("bhyt")
class ReusedMeanSquare(Residual):
    r"""Normalize the mlp's input by an estimate of its mean square.

        m = mean(block_input^2) + c (lam / kappa)^2,  c = first(|W_V^T W_O^T|_F^2)
        s = entry(x);  y = out(skip(s) + post(branch(pre(s, m))))

    lam and kappa are those of attention's norm, W_V (kv heads repeated) and W_O its matrices as
    they are now; neither they nor lam get a gradient from here. `first` holds the constant
    1 / (seq_len hidden). The paper's code keeps c until a callback renews it; here it costs two
    products of the size (kv_heads head_dim)^2 hidden in every forward.

    Shape: x, block_input and y are (batch, seq, hidden), m is (batch, seq, 1).

    Raises:
        ValueError: where attention's or the mlp's norm is no `bhyt`, or attention's matrices are
            not held plainly.

    Source: BHyT, ICML 2026, arXiv:2601.09719.
    """

    slots = (*RESIDUAL_SLOTS, "first")
    routed = False

    def __init__(self, spec: ResidualSpec, dim: int, block: Any = None) -> None:
        super().__init__(spec, dim, block)
        attention = getattr(block, "self_attn", None)
        norms = (getattr(getattr(block, "attn_residual", None), "pre", None), self.pre)
        # By what they have, not by class: of a checkpoint's code transformers loads two copies, one
        # with the config, which builds norms, and one with the model.
        if attention is None or not all(hasattr(norm, "kappa") for norm in norms):
            raise ValueError("residual module bhyt is the mlp's, where both norms are bhyt")
        if type(attention.v_proj) is not nn.Linear:
            raise ValueError("residual module bhyt reads attention's matrices; keep weights plain")
        self._elsewhere = (block.attn_residual, attention)  # a tuple: not registered twice

    def forward(
        self,
        x: torch.Tensor,
        block_input: torch.Tensor,
        branch: Callable[..., torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        s = self.entry(x)
        h = block_input.to(compute_dtype(block_input))
        m = h.pow(2).mean(-1, keepdim=True) + self.growth().to(h.dtype)
        return self.out(self.skip(s) + self.post(branch(self.pre(s, m), **kwargs)))

    def growth(self) -> torch.Tensor:
        """What attention is taken to add to the mean square: c (lam / kappa)^2, shape (1,)."""
        residual, attention = self._elsewhere
        norm = residual.pre
        lam, v, o = (
            _whole(parameter).to(compute_dtype(parameter))
            for parameter in (norm.lam, attention.v_proj.weight, attention.o_proj.weight)
        )
        heads = (-1, attention.core.num_key_value_groups, attention.head_dim)
        o = o.unflatten(1, heads).sum(2).flatten(1)  # (hidden, kv_heads * head_dim)
        with torch.autocast(o.device.type, enabled=False):
            product = ((o.mT @ o) * (v @ v.mT)).sum()  # |W_V^T W_O^T|_F^2, a group shares its W_V
        return self.first(product) * (lam / norm.kappa).square()


def _whole(parameter: Any) -> torch.Tensor:
    """The values of a parameter without its gradient, gathered if it is sharded."""
    values = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values
