"""Pre-LN whose branches are damped by the number of branches."""

from dataclasses import dataclass

from llmnorm.modeling.affine import check_choice
from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("depth_scaled", paper="2510.03470")
@dataclass(frozen=True, kw_only=True)
class DepthScaled(Placement):
    """y = x + n^(-power) F(N(x)), n the number of residual modules.

    Identical to Pre-LN except: that constant. Power 1 bounds the sum of n branches, 1/2 its
    variance. Only the abstract was at hand: what counts as a module in a transformer is the option
    `count`, its default ours, and that the norm stays is our reading.

    Args:
        power: 1 or 0.5 in the paper.
        count: `sublayers`, n = 2 L with L the number of layers, or `layers`, n = L.

    Raises:
        ValueError: for a power that is not above 0 or an unknown `count`.

    Source: Dherin and Munn, "On residual network depth", 2025, arXiv:2510.03470.
    """

    power: float = 1.0
    count: str = "sublayers"

    def __post_init__(self) -> None:
        check_positive("depth_scaled.power", self.power)
        check_choice("depth_scaled.count", self.count, ("sublayers", "layers"))

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        n = 2 * site.depth if self.count == "sublayers" else site.depth
        return ResidualSpec(pre=norm, post=constant(n**-self.power))
