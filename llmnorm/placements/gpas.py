"""GPAS: a learned, gradient-preserving shrinking of the stream, on top of another placement."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, parse_placement, register


@register("gpas", paper="2506.22049")
@dataclass(frozen=True, kw_only=True)
class GPAS(Placement):
    """Pre-LN: y = g(x + F(N(x))) with g(h) = h - silu(a) stop_gradient(h), one a for each layer.

    Identical to its base except: where the base leaves the sum as it is, g acts on the sum; where
    the base normalizes it (Post-LN, DeepNorm, the first layers of Mix-LN), g acts on the skip
    alone: y = N(alpha g(x) + F(x)). The gate a starts at 0, where g is the identity, and serves
    both sublayers of its layer. Gradients pass g unchanged. Init, embedding and final norm are the
    base's; the paper's code starts embeddings at std sqrt(2/5) and clips the gate's gradient at
    0.01 for 7B and for Sandwich-LN at 1B. With `base: lns` the factor 1/sqrt(l) stays a constant,
    where that code makes it the initial gain.

    Args:
        base: another placement, by name or as a mapping with options.

    Raises:
        ValueError: for a base that is gpas itself, has a joint other than the slots, or joins the
            two sublayers of a layer in different ways, so that they cannot share a gate.

    Source: Chen et al., "GPAS: Accelerating Convergence of LLM Pretraining via
    Gradient-Preserving Activation Scaling", NeurIPS 2025, arXiv:2506.22049.
    """

    base: str | Mapping[str, Any] = field(default="pre_ln", metadata={"checks_itself": True})

    def __post_init__(self) -> None:
        if isinstance(self._base, GPAS):
            raise ValueError("gpas.base is gpas; expected another placement")

    @property
    def _base(self) -> Placement:
        return parse_placement(self.base)

    @property
    def init(self) -> Any:
        return self._base.init

    @property
    def embedding(self) -> Any:
        return self._base.embedding

    @property
    def weights(self) -> Any:
        return self._base.weights

    @property
    def accepts(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return self._base.accepts

    @property
    def parametrization(self) -> str | dict[str, Any]:
        return self._base.parametrization

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        attn = _gate(self._base.residual(replace(site, kind="attn"), norm))
        mlp = _gate(self._base.residual(replace(site, kind="mlp"), norm))
        if attn is None or attn != mlp:
            raise ValueError(
                f"gpas.base is {self._base.name}, whose sublayers in layer {site.number} are not "
                "joined to the stream in one way that a shared gate fits"
            )
        slot, gate = attn
        spec = self._base.residual(site, norm)
        return spec.having(**{slot: replace(gate, shared=site.kind == "mlp")})

    def final_norm(self, norm: NormSpec) -> NormSpec | None:
        return self._base.final_norm(norm)

    def logits(self, hidden_size: int) -> NormSpec | None:
        return self._base.logits(hidden_size)


def _gate(spec: ResidualSpec) -> tuple[str, NormSpec] | None:
    """The slot of a sublayer's gate and what it holds; None where the slots leave no place."""
    if spec.module != "residual":
        return None
    gate = NormSpec(op="gpas", options={})
    if spec.out is None:
        return "out", gate
    if spec.skip is None:
        return "skip", gate
    if spec.skip.op == "constant":
        return "skip", gate.scaled(spec.skip.options["value"])
    return None
