"""Post-LN, the placement of the original transformer."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("post_ln", paper="1706.03762")
@dataclass(frozen=True, kw_only=True)
class PostLN(Placement):
    """Normalize the stream after each addition: y = N(x + F(x)). No final norm: the last op is one.

    Wants a lower learning rate and a longer warm-up than Pre-LN; deep stacks may diverge.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(out=norm)

    def final_norm(self, norm: NormSpec) -> None:
        return None
