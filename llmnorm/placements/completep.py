"""CompleteP: Pre-LN whose branches shrink with depth, with muP's rules for width."""

from dataclasses import dataclass
from typing import Any

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("completep", paper="2505.01618")
@dataclass(frozen=True, kw_only=True)
class CompleteP(Placement):
    """y = x + F(N(x)) / m_L^alpha with m_L = L / base_depth, L the number of layers.

    Identical to Pre-LN except: that constant, and the parametrization `mup` with the same base,
    which sets std, learning rate, weight decay and Adam's eps by width and depth.

    Args:
        base_width: hidden size of the model whose learning rate is used.
        base_depth: its number of layers, where the branch is not damped. Both defaults are ours.
        alpha: 1 in CompleteP; the paper compares it with 0.5.

    Raises:
        ValueError: for an option that is not above 0.

    Source: Dey et al., "Don't be lazy: CompleteP enables compute-efficient deep transformers",
    2025, arXiv:2505.01618.
    """

    base_width: int = 256
    base_depth: int = 4
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for option in ("base_width", "base_depth", "alpha"):
            check_positive(f"completep.{option}", getattr(self, option))

    @property
    def parametrization(self) -> dict[str, Any]:
        return {
            "name": "mup",
            "base_width": self.base_width,
            "base_depth": self.base_depth,
            "alpha": self.alpha,
        }

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(pre=norm, post=constant((site.depth / self.base_depth) ** -self.alpha))
