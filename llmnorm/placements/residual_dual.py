"""ResiDual: a Post-LN stream beside one that is never normalized."""

from dataclasses import dataclass

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant
from llmnorm.modeling.streams import StreamsSpec

from .base import Placement, Site, register

# Of the last norm in the reference's code: small, so that a scaled stream is still normalized.
_FINAL_EPS = 1e-7


@register("residual_dual", paper="2304.14802")
@dataclass(frozen=True, kw_only=True)
class ResidualDual(Placement):
    """Join each branch to two streams: p = N(p + F(p)), r = r + scale F(p).

    Identical to Post-LN except: the branches are also summed up in r, which starts at scale times
    the embedding, and the output is alpha p + N'(r). N' has eps 1e-7 (or the norm's, if smaller) as
    in the authors' code. The stream takes twice the memory.

    Args:
        scale: of the second stream; 0.1 keeps it small in float16. N' cancels it up to eps.
        alpha: weight of the first stream in the output; 1 in the paper.

    Raises:
        ValueError: for a scale that is not above 0.

    Source: Xie et al., "ResiDual: Transformer with Dual Residual Connections", 2023,
    arXiv:2304.14802.
    """

    scale: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("residual_dual.scale", self.scale)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        second = None if self.scale == 1 else constant(self.scale)
        return ResidualSpec(module="residual_dual", out=norm, second=second)

    def streams(self, norm: NormSpec) -> StreamsSpec:
        eps = norm.options.get("eps")
        last = norm if eps is None else norm.having(eps=min(eps, _FINAL_EPS))
        first = None if self.alpha == 1 else constant(self.alpha)
        return StreamsSpec(first=first, second=last, scale=self.scale)

    def final_norm(self, norm: NormSpec) -> None:
        return None
