"""LayerNorm Scaling: Pre-LN whose norm output shrinks with depth."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("lns", paper="2502.05795")
@dataclass(frozen=True, kw_only=True)
class LNS(Placement):
    """Identical to Pre-LN except: the norms of layer number l (1-based) are multiplied by
    1/sqrt(l).

    The final norm is not scaled. Use plain initialization: beside the factor, scaled init adds
    nothing and costs a little.

    Source: Sun et al., "The Curse of Depth in Large Language Models", NeurIPS 2025,
    arXiv:2502.05795.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm.scaled(site.number**-0.5))
