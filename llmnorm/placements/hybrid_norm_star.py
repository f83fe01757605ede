"""HybridNorm*: HybridNorm with an ordinary Pre-LN first layer."""

from dataclasses import dataclass, replace
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register
from .hybrid_norm import qkv_norm


@register("hybrid_norm_star", paper="2503.04598")
@dataclass(frozen=True, kw_only=True)
class HybridNormStar(Placement):
    """Layer 1: y = x + A_qkv(N(x)), y = x + F(N(x)); the others as HybridNorm.

    Identical to HybridNorm except: layer 1 is Pre-LN, with its norms on q, k and v kept, and
    attention's output may be normalized.

    Args:
        post: normalize attention's output with an initial gain of 1/sqrt(2 L), as the paper's 7B
            model does (we have not verified that it is otherwise HybridNorm*); for norms that have
            the option `weight_init`.

    Source: Zhuo et al., "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid
    Normalization", NeurIPS 2025, arXiv:2503.04598.
    """

    init: ClassVar[str] = "scaled"

    post: bool = False

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        first = site.layer_idx == 0
        if site.kind == "mlp":
            return ResidualSpec(pre=norm) if first else ResidualSpec(entry=norm)
        post = norm.having(weight_init=(2 * site.depth) ** -0.5) if self.post else None
        return replace(qkv_norm(norm), pre=norm if first else None, post=post)
