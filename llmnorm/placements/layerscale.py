"""LayerScale: Pre-LN with a small learned gain on every branch."""

from dataclasses import dataclass

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


def start(depth: int) -> float:
    """The paper's start for a depth, from memory: 0.1 to 18 layers, 1e-5 to 24, then 1e-6."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


@register("layerscale", paper="2103.17239")
@dataclass(frozen=True, kw_only=True)
class LayerScale(Placement):
    """y = x + g * F(N(x)), g a learned vector that starts small.

    Identical to Pre-LN except: that gain.

    Args:
        value: where g starts; by default 0.1, 1e-5 or 1e-6 by depth (`start`).

    Raises:
        ValueError: for a value that is not above 0.

    Source: Touvron et al., "Going deeper with Image Transformers", 2021, arXiv:2103.17239.
    """

    value: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None:
            check_positive("layerscale.value", self.value)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        value = start(site.depth) if self.value is None else self.value
        return ResidualSpec(pre=norm, post=NormSpec(op="gain", options={"value": value}))
