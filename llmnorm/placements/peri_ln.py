"""Peri-LN, the placement of Gemma 2 and 3."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("peri_ln", paper="2502.02732")
@dataclass(frozen=True, kw_only=True)
class PeriLN(Placement):
    """Normalize around each sublayer: y = x + N'(F(N(x))).

    Identical to Pre-LN except: the branch is normalized too. The paper's norm of the embedding is
    optional; that it is the default is ours, since the first branches of RMS 1 would swamp an
    embedding of standard deviation 0.02.

    Source: Kim et al., "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
    ICML 2025, arXiv:2502.02732.
    """

    embedding: ClassVar[str] = "norm"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm, post=norm)
