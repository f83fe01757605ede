"""ReZero: no norm in the blocks, and one learned number a layer that starts at 0."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("rezero", paper="2003.04887")
@dataclass(frozen=True, kw_only=True)
class ReZero(Placement):
    """y = x + a F(x), a one learned number, first 0, that attention and mlp of a layer share.

    From memory. Every block starts as the identity. The scheme's norm stands before the head alone;
    norm `none` gives a model without any.

    Source: Bachlechner et al., "ReZero is All You Need", 2020, arXiv:2003.04887.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        shared = site.kind == "mlp"
        return ResidualSpec(post=NormSpec(op="scalar_gain", options={"value": 0.0}, shared=shared))
