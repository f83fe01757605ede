"""Admin: Post-LN whose skips are scaled by what the branches before them add."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("admin", paper="2004.08249")
@dataclass(frozen=True, kw_only=True)
class Admin(Placement):
    """y = N(omega * x + F(x)), omega a learned vector. No final norm.

    Identical to Post-LN except: omega, whose start `llmnorm.calibration` measures when a model is
    built: in sublayer i, sqrt(1 + sum over j < i of Var F_j) of plain Post-LN. The sum is the
    paper's; that it starts from 1, the variance of a normalized input, is ours.

    Source: Liu et al., "Understanding the Difficulty of Training Transformers", EMNLP 2020,
    arXiv:2004.08249 (from memory).
    """

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        return ResidualSpec(skip=NormSpec(op="profiled_gain", options={"value": 0.0}), out=norm)

    def final_norm(self, norm: NormSpec) -> None:
        return None
