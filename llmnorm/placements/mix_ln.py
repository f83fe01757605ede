"""Mix-LN: Post-LN in the first layers, Pre-LN in the rest."""

import math
from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("mix_ln", paper="2412.13795")
@dataclass(frozen=True, kw_only=True)
class MixLN(Placement):
    """Post-LN in the first floor(fraction * depth) layers, Pre-LN after them; nothing in between.

    The final norm stays, also for fraction 1. Diverges in long runs by the LNS authors' account.

    Args:
        fraction: share of layers that are Post-LN, 0 to 1.

    Raises:
        ValueError: for a fraction outside 0 to 1.

    Source: Li et al., "Mix-LN: Unleashing the Power of Deeper Layers", ICLR 2025, arXiv:2412.13795.
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"mix_ln.fraction is {self.fraction!r}; expected 0 to 1")

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        boundary = math.floor(self.fraction * site.depth + 1e-9)  # 0.58 * 50 is 28.999...
        return ResidualSpec(out=norm) if site.layer_idx < boundary else ResidualSpec(pre=norm)
