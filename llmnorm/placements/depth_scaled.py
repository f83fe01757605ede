"""Pre-LN whose branches are damped by the number of branches."""

from dataclasses import dataclass

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("depth_scaled", paper="2510.03470")
@dataclass(frozen=True, kw_only=True)
class DepthScaled(Placement):
    """y = x + n^(-power) F(N(x)), n the number of residual modules.

    Identical to Pre-LN except: that constant. Power 1 bounds the sum of all branches, 1/2 its
    variance. That n is 2 L, L the number of layers, and that the norm stays are our reading: only
    the abstract was at hand.

    Args:
        power: 1 or 0.5 in the paper.

    Raises:
        ValueError: for a power that is not above 0.

    Source: arXiv:2510.03470.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_positive("depth_scaled.power", self.power)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm, post=constant((2 * site.depth) ** -self.power))
