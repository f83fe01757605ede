"""nGPT: tokens and matrices on the unit sphere."""

from dataclasses import dataclass
from typing import ClassVar

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register

_UNIT = {"length": "one", "gain": "none", "groups": 1, "scale": 1.0}


@register("ngpt", paper="2410.01131")
@dataclass(frozen=True, kw_only=True)
class NGPT(Placement):
    """Step towards the branch and return to the sphere: y = N(x + |a| * (N(F(x)) - x)).

    N is the L2 norm and the only one: no norm before the branch and no final one. a is one learned
    rate a feature, at first `rate`. Queries and keys have length one after RoPE, the logits of
    attention are sqrt(head_dim) g^2 q k with one gain g a feature and query head, at first 1; those
    of the vocabulary have one gain an entry, at first 1. Rates and these gains are stored at
    1/sqrt(hidden_size). In the mlp, gate and up are multiplied by gains that start at
    sqrt(hidden_size), stored at 1: the paper's text gives the root to the gate alone, its code to
    both, and both are the same function, since the branch is normalized.

    Every matrix has rows of length one along the hidden axis, at the start and after each optimizer
    step (`weights` is `unit`). As in the paper the stream itself is not normalized again at the
    next sublayer; its code does so, which matters for the gradient of the embedding's length alone.
    Wants no weight decay and no warm-up.

    Args:
        rate: initial step towards the branch; the paper's value is 0.05, of order 1/depth.

    Raises:
        ValueError: for a rate that is not above 0, or a norm that does not give length one.

    Source: Loshchilov et al., "nGPT: Normalized Transformer with Representation Learning on the
    Hypersphere", 2024, arXiv:2410.01131.
    """

    rate: float = 0.05

    weights: ClassVar[str] = "unit"
    accepts: ClassVar[tuple[str, ...]] = ("l2norm",)

    def __post_init__(self) -> None:
        check_positive("ngpt.rate", self.rate)

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        for option, wanted in _UNIT.items():
            if norm.options[option] != wanted:
                raise ValueError(
                    f"ngpt keeps tokens on the unit sphere: l2norm.{option} is "
                    f"{norm.options[option]!r}; expected {wanted!r}"
                )
        stored = site.hidden_size**-0.5
        rate = NormSpec(op="ngpt_rate", options={"value": self.rate, "stored": stored})
        joint = ResidualSpec(module="lerp", first=rate, post=norm, out=norm)
        if site.kind == "attn":
            query = {
                "heads": site.num_attention_heads,
                "stored": stored,
                "eps": norm.options["eps"],
            }
            return joint.having(q_rotated=NormSpec(op="ngpt_query", options=query), k_rotated=norm)
        gain = NormSpec(op="ngpt_gain", options={"value": site.hidden_size**0.5})
        return joint.having(gate=gain, up=gain)

    def final_norm(self, norm: NormSpec) -> None:
        return None

    def logits(self, hidden_size: int) -> NormSpec:
        return NormSpec(op="ngpt_gain", options={"stored": hidden_size**-0.5})
