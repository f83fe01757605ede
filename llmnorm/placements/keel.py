"""Keel: Post-LN with a heavy skip and a norm inside the branch."""

from dataclasses import dataclass

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant

from .base import Placement, Site, register


@register("keel", paper="2601.19895")
@dataclass(frozen=True, kw_only=True)
class Keel(Placement):
    """y = N'(alpha x + F(N(x))) with alpha = 2 L, the number of sublayers.

    Identical to Post-LN except: the skip is multiplied by alpha and the branch reads a normalized
    stream. In layer 1 attention is plain Pre-LN (no N', no alpha) and the mlp has no alpha. No
    final norm. A sublayer multiplies the gradient of its skip by about alpha / sqrt(alpha^2 + 1).
    The paper counts sublayers as layers and uses rmsnorm.

    Args:
        alpha: weight of the skip; the number of sublayers if not given. The paper allows less
            (above 1) in shallow models.

    Raises:
        ValueError: for an alpha that is not above 0.

    Source: Chen and Wei, "Post-LayerNorm Is Back: Stable, ExpressivE, and Deep", 2026,
    arXiv:2601.19895.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_positive("keel.alpha", self.alpha)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        if site.layer_idx == 0:
            return ResidualSpec(pre=norm, out=None if site.kind == "attn" else norm)
        alpha = 2.0 * site.depth if self.alpha is None else self.alpha
        return ResidualSpec(pre=norm, skip=constant(alpha), out=norm)

    def final_norm(self, norm: NormSpec) -> None:
        return None
