"""Sandwich-LN, CogView's placement."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("sandwich_ln", paper="2105.13290")
@dataclass(frozen=True, kw_only=True)
class SandwichLN(Placement):
    """Normalize before and after each sublayer: y = x + N'(F(N(x))).

    Identical to Peri-LN except: the embedding stays raw. The paper's norm is layernorm. Its code
    also divides what a norm reads by max|x| / 8 and relaxes attention logits (PB-relax); both
    serve fp16 and are no part of the placement.

    Source: Ding et al., "CogView: Mastering Text-to-Image Generation via Transformers", NeurIPS
    2021, arXiv:2105.13290.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm, post=norm)
