"""Sub-LN: a second norm before each sublayer's output projection."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("sub_ln", paper="2210.06423")
@dataclass(frozen=True, kw_only=True)
class SubLN(Placement):
    """y = x + W_o N'(A(N(x))) and y = x + W_down N'(act(...)).

    Identical to Pre-LN except: what the output projections read is normalized too, and the init
    policy `sub_ln` scales v, o, gate, up and down by sqrt(log(2 L)), L the number of layers.

    Source: Wang et al., "Foundation Transformers" (Magneto), 2022, arXiv:2210.06423.
    """

    init: ClassVar[str] = "sub_ln"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm, inner=norm)
