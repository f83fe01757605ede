"""Normalize-and-project: a norm before every nonlinearity, and weights of constant norm."""

from dataclasses import dataclass
from typing import Any, ClassVar

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("nap", paper="2407.01800")
@dataclass(frozen=True, kw_only=True)
class NaP(Placement):
    """y = x + W_o A(N(x)) and y = x + W_down(act(N'(W_gate N(x))) * N''(W_up N(x))).

    Identical to Pre-LN except: the mlp's activation reads normalized features, in a gated mlp both
    factors of its product (our reading), and the weights `project` bring each matrix of the blocks
    back to the Frobenius norm that its init is expected to have (std times the root of the number
    of its elements; the drawn one differs a little), so that the learning rate alone sets its
    relative change.
    Queries and keys are left to `qk_norm`. The paper also decays or rescales the norms' gains and
    biases; that is left out.

    Source: Lyle et al., "Normalization and effective learning rates in reinforcement learning",
    2024, arXiv:2407.01800 (abstract; the rest from memory).
    """

    weights: ClassVar[Any] = {"kind": "project"}

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        spec = ResidualSpec(pre=norm)
        return spec.having(gate=norm, up=norm) if site.kind == "mlp" else spec
