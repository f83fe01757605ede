"""SiameseNorm: a normalized and an unnormalized stream, both read by every branch."""

from dataclasses import dataclass

from llmnorm.modeling.operations import check_positive
from llmnorm.modeling.residual import NormSpec, ResidualSpec, constant
from llmnorm.modeling.streams import StreamsSpec

from .base import Placement, Site, register
from .hybrid_norm import qkv_norm

_VARIANTS = ("post_pre", "hybrid")


@register("siamese_norm", paper="2602.08064")
@dataclass(frozen=True, kw_only=True)
class SiameseNorm(Placement):
    """Let each branch read the sum of two streams: f = F(N(p + N'(r))), r = r + f.

    Both streams start as the embedding; p takes the branch divided by c = sqrt(damping l), l the
    1-based layer. The variants differ in p and in the end:

        post_pre  p = N''(p + f/c); the output is p + N(r) (the paper's algorithm 1)
        hybrid    attention reads g p + N'(r), g one learned gain a feature, with norms on q, k, v
                  per head, and p = p + f/c; at the mlp p is first normalized, then p = p + f/c;
                  the output is N(N(p) + N(r)) (the authors' language model, one norm more than
                  algorithm 1)

    Args:
        variant: `post_pre` or `hybrid`.
        damping: the paper's formula has 1; the authors' code 2, which counts sublayers.
        star: hybrid alone: in layer 1 a norm stands for g, and the mlp's skip carries p before
            its norm, as in HybridNorm*.

    Raises:
        ValueError: for an unknown variant, a damping that is not above 0, or star on post_pre.

    Source: "SiameseNorm", ICML 2026, arXiv:2602.08064.
    """

    variant: str = "post_pre"
    damping: float = 1.0
    star: bool = False

    def __post_init__(self) -> None:
        if self.variant not in _VARIANTS:
            known = " or ".join(_VARIANTS)
            raise ValueError(f"siamese_norm.variant is {self.variant!r}; expected {known}")
        check_positive("siamese_norm.damping", self.damping)
        if self.star and self.variant != "hybrid":
            raise ValueError("siamese_norm.star is for variant hybrid alone")

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        branch = constant((self.damping * site.number) ** -0.5)
        joint = ResidualSpec(module="siamese", second=norm, post=branch)
        if self.variant == "post_pre":
            return joint.having(pre=norm, out=norm)
        star = self.star and site.number == 1
        if site.kind == "mlp":
            return joint.having(pre=norm, **{"first" if star else "entry": norm})
        gain = NormSpec(op="gain", options={})
        return joint.having(first=norm if star else gain, **qkv_norm(norm).slots())

    def streams(self, norm: NormSpec) -> StreamsSpec:
        return StreamsSpec(first=norm if self.variant == "hybrid" else None, second=norm)

    def final_norm(self, norm: NormSpec) -> NormSpec | None:
        return norm if self.variant == "hybrid" else None
