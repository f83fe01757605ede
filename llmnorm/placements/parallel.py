"""The parallel block of GPT-J and PaLM."""

from dataclasses import dataclass, replace

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("parallel", paper="2204.02311")
@dataclass(frozen=True, kw_only=True)
class Parallel(Placement):
    """Attention and mlp side by side: y = x + A(N(x)) + F(N(x)).

    Identical to Pre-LN except: the mlp reads the block's input, not attention's sum.

    Args:
        shared_norm: one norm for both (GPT-J, PaLM), with attention's options where a norm has
            others at the mlp (dyt's alpha in wide models); false: one each (GPT-NeoX).

    Which of the three shares its norm is stated from memory.

    Source: Wang and Komatsuzaki, "GPT-J-6B", 2021; Chowdhery et al., "PaLM", 2022,
    arXiv:2204.02311; with two norms Black et al., "GPT-NeoX-20B", 2022, arXiv:2204.06745.
    """

    shared_norm: bool = True

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        if site.kind == "attn":
            return ResidualSpec(pre=norm)
        return ResidualSpec(pre=replace(norm, shared=self.shared_norm), reads="block")
