"""HybridNorm: norms on queries, keys and values, and a normalized stream for the mlp."""

from dataclasses import dataclass, replace
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


def qkv_norm(norm: NormSpec) -> ResidualSpec:
    """Attention A_qkv: queries, keys and values each normalized over the features of a head."""
    head = replace(norm, per_head=True)
    return ResidualSpec(q=head, k=head, v=head)


@register("hybrid_norm", paper="2503.04598")
@dataclass(frozen=True, kw_only=True)
class HybridNorm(Placement):
    """Attention: y = x + A_qkv(x); mlp: y = s + F(s) with s = N(x).

    A_qkv normalizes queries, keys and values over each head's features, before RoPE, with gains
    that the heads share, and reads the raw stream; the mlp's skip is the normalized stream. The
    final norm stays. Its own norms on q and k take the place of `qk_norm`, which must be none.
    Init `scaled` (Megatron's) suits it best, as the paper shows.

    Source: Zhuo et al., "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid
    Normalization", NeurIPS 2025, arXiv:2503.04598.
    """

    init: ClassVar[str] = "scaled"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return qkv_norm(norm) if site.kind == "attn" else ResidualSpec(entry=norm)
