"""Full BHyT: Pre-LN in which one statistic serves both sublayers of a block."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("bhyt", paper="2601.09719")
@dataclass(frozen=True, kw_only=True)
class FullBHyT(Placement):
    """Pre-LN with the norm bhyt, whose mlp site reuses the block's statistic.

    Identical to Pre-LN except: the mlp's norm takes, in place of the mean square of its input, that
    of the block's input plus |W_V^T W_O^T|_F^2 / (seq_len hidden) (lam / kappa)^2, lam attention's.
    Norm bhyt with pre_ln is the star form. The final norm is bhyt's (`last_lam`).

    Args:
        seq_len: the length T in the estimate, in tokens; the paper's code takes the length that a
            run is configured with, whatever it is given. 2048 is our default: the usual
            `max_position_embeddings`.

    Raises:
        ValueError: for a seq_len below 1.

    Source: BHyT, ICML 2026, arXiv:2601.09719.
    """

    accepts: ClassVar[tuple[str, ...]] = ("bhyt",)
    seq_len: int = 2048

    def __post_init__(self) -> None:
        if not (isinstance(self.seq_len, int) and self.seq_len >= 1):
            raise ValueError(f"bhyt.seq_len is {self.seq_len!r}; expected a whole number from 1")

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        if site.kind == "attn":
            return ResidualSpec(pre=norm)
        per_entry = constant(1 / (self.seq_len * site.hidden_size))
        return ResidualSpec(pre=norm, first=per_entry, module="bhyt")
