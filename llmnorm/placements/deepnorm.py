"""DeepNorm: Post-LN with an up-weighted skip and a damped init."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("deepnorm", paper="2203.00555")
@dataclass(frozen=True, kw_only=True)
class DeepNorm(Placement):
    """y = N(alpha x + F(x)) with alpha = (2 L)^(1/4), L the number of layers (decoder only).

    Identical to Post-LN except: the skip is multiplied by alpha, and the init policy `deepnorm`
    scales v, o, gate, up and down by beta = (8 L)^(-1/4). The sign of that exponent is the paper's;
    the Mix-LN and LayerNorm-Scaling repositories have it flipped. No final norm. The embedding is
    raw with the usual std; torchscale draws it with std 1/sqrt(d), d the hidden size, and
    multiplies by sqrt(d).

    Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022, arXiv:2203.00555.
    """

    init: ClassVar[str] = "deepnorm"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(skip=constant((2 * site.depth) ** 0.25), out=norm)

    def final_norm(self, norm: NormSpec) -> None:
        return None
