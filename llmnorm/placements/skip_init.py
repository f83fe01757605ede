"""SkipInit: every branch behind one learned number that starts at 0."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("skip_init", paper="2002.10444")
@dataclass(frozen=True, kw_only=True)
class SkipInit(Placement):
    """y = x + a F(N(x)), a one learned number a branch.

    Identical to Pre-LN except: that number. The original has no norm (norm `none`) and starts a at
    0, where every block is the identity (from memory); the LNS paper compares Pre-LN with a started
    at 1/sqrt(L), L the number of layers: give that as `value`.

    Args:
        value: where a starts.

    Source: De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity
    Function in Deep Networks", 2020, arXiv:2002.10444; the variant in arXiv:2502.05795.
    """

    value: float = 0.0

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(
            pre=norm, post=NormSpec(op="scalar_gain", options={"value": self.value})
        )
