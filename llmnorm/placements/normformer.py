"""NormFormer: Pre-LN with norms and gains inside the sublayers."""

from dataclasses import dataclass

from llmnorm.modeling.residual import NormSpec, ResidualSpec

from .base import Placement, Site, register


@register("normformer", paper="2110.09456")
@dataclass(frozen=True, kw_only=True)
class NormFormer(Placement):
    """Attention: y = x + N'(W_o HeadScale(A(N(x)))); mlp: y = r x + W_down N''(act(...)).

    Identical to Pre-LN except: each head's output has a learned gain, attention's output and the
    mlp's inner activations are normalized, and the mlp's skip may be scaled. The head gain stands
    before the output projection, as in the paper (its fairseq code has it after). In a gated mlp
    the inner norm acts on act(gate) * up, our choice.

    Args:
        res_scale: learn a gain on the skip of the mlp (ResScale).

    Source: Shleifer et al., "NormFormer", 2021, arXiv:2110.09456.
    """

    res_scale: bool = False

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        if site.kind == "attn":
            heads = NormSpec(op="head_gain", options={"heads": site.num_attention_heads})
            return ResidualSpec(pre=norm, inner=heads, post=norm)
        skip = NormSpec(op="gain", options={}) if self.res_scale else None
        return ResidualSpec(pre=norm, inner=norm, skip=skip)
