"""Res-Post-LN, the reordered norm of Swin v2 and OLMo 2."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("res_post_ln", paper="2501.00656")
@dataclass(frozen=True, kw_only=True)
class ResPostLN(Placement):
    """Normalize each branch, not what it reads: y = x + N(F(x)).

    OLMo 2 is this placement with rmsnorm and `qk_norm: full_width`.

    Source: Team OLMo, "2 OLMo 2 Furious", 2025, arXiv:2501.00656.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(post=norm)
