"""Scale-Distribution Decoupling: a norm after every linear layer of a Post-LN stack."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("sdd", paper="2502.15499")
@dataclass(frozen=True, kw_only=True)
class SDD(Placement):
    """Every linear layer is alpha * (V x) / RMS(V x): V gives the direction, alpha the scale.

    Identical to Post-LN except: the norm after each of the seven matrices of a block, whose gain is
    alpha, first 1 and 1/sqrt(L) after o and down, L the number of layers; and the init policy
    `small`, which is SDD's 1/sqrt(2.5 d). The norm acts on all features of q, k, v and not on each
    head. Embedding and head are plain: the text names linear layers, its code was not at hand.

    Source: "Scale-Distribution Decoupling", 2025, arXiv:2502.15499.
    """

    init: ClassVar[str] = "small"
    accepts: ClassVar[tuple[str, ...]] = ("rmsnorm",)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        spec = ResidualSpec(post=norm.having(weight_init=site.depth**-0.5), out=norm)
        inner = ("q", "k", "v") if site.kind == "attn" else ("gate", "up")
        return spec.having(**dict.fromkeys(inner, norm))

    def final_norm(self, norm: NormSpec) -> None:
        return None
