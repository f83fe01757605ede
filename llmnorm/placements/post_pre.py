"""Post-Pre: Post-LN for attention, Pre-LN for the mlp."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("post_pre", paper="2503.04598")
@dataclass(frozen=True, kw_only=True)
class PostPre(Placement):
    """Attention: y = N(x + A(x)); mlp: y = x + F(N(x)).

    Identical to Pre-LN except: attention is Post-LN. The final norm stays. An ablation of the
    HybridNorm paper.

    Source: Zhuo et al., "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid
    Normalization", NeurIPS 2025, arXiv:2503.04598.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(out=norm) if site.kind == "attn" else ResidualSpec(pre=norm)
