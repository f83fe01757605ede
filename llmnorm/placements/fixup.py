"""Fixup: no norm in the blocks; scalar biases, a scalar gain and an init by depth instead."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register

BIAS = NormSpec(op="scalar_bias", options={})
GAIN = NormSpec(op="scalar_gain", options={})


@register("fixup", paper="1901.09321")
@dataclass(frozen=True, kw_only=True)
class Fixup(Placement):
    """y = x + a W_out(b' + G(W_in(x + b))), a and each b one learned number.

    From memory: a bias (first 0) before each linear layer and each nonlinearity, a multiplier
    (first 1) at the end of each branch, and the init policy `fixup`, which starts the output
    projections at 0. In a gated mlp both inputs of the product have their bias, our reading. The
    scheme's norm stands before the head alone; norm `none` gives a model without any.

    Source: Zhang et al., "Fixup Initialization: Residual Learning Without Normalization", ICLR
    2019, arXiv:1901.09321.
    """

    init: ClassVar[str] = "fixup"

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        spec = ResidualSpec(pre=BIAS, inner=BIAS, post=GAIN)
        return spec.having(gate=BIAS, up=BIAS) if site.kind == "mlp" else spec
