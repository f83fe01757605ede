"""Pre-Post: Pre-LN for attention, Post-LN for the mlp."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("pre_post", paper="2503.04598")
@dataclass(frozen=True, kw_only=True)
class PrePost(Placement):
    """Attention: y = x + A(N(x)); mlp: y = N(x + F(x)).

    Identical to Pre-LN except: the mlp is Post-LN. The final norm stays, although the last block
    ends in one. An ablation of the HybridNorm paper.

    Source: Zhuo et al., "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid
    Normalization", NeurIPS 2025, arXiv:2503.04598.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm) if site.kind == "attn" else ResidualSpec(out=norm)
