"""SpanNorm: Post-LN whose mlp skips the whole block."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("span_norm", paper="2601.22580")
@dataclass(frozen=True, kw_only=True)
class SpanNorm(Placement):
    """With x the block's input: h = N(x + A(x)), y = N'(x + F(h)).

    Identical to Post-LN except: the mlp's skip starts at the block's input, so attention reaches
    the stream through the mlp alone; in layer 1 attention (not its skip) reads N''(x). No final
    norm. The paper scales the initial branches by depth ("Scale Init") with a factor that we have
    not found: `init: scaled` (output projections / sqrt(2 L)) is our default in its place. The
    formula is from reviews and a third-party implementation, not from the paper itself.

    Source: Wang et al., "SpanNorm: Reconciling Training Stability and Performance in Deep
    Transformers", 2026, arXiv:2601.22580.
    """

    init: ClassVar[str] = "scaled"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        if site.kind == "mlp":
            return ResidualSpec(out=norm, skips="block")
        return ResidualSpec(pre=norm if site.layer_idx == 0 else None, out=norm)

    def final_norm(self, norm: NormSpec) -> None:
        return None
