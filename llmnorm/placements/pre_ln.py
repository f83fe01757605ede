"""Pre-LN, the placement of GPT-2 and Llama."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("pre_ln", paper="2002.04745")
@dataclass(frozen=True, kw_only=True)
class PreLN(Placement):
    """Normalize what each sublayer reads: y = x + F(N(x)), and the stream before the head.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020,
    arXiv:2002.04745.
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm)
