"""Layer cases: the reference's hyper-parameters as one of our norms or attention modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmnorm.modeling.attention import Attention
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.norms import (
    CRMSNorm,
    Derf,
    DyT,
    L2Norm,
    LayerNorm,
    PRMSNorm,
    RMSNorm,
    ScaleNorm,
)
from llmnorm.modeling.residual import NormSpec, ResidualSpec
from llmnorm.modeling.rotary import rotary_table

from .cases import Case, Map, NotImplementedCaseError, Switches, matching

_EPS_PLACEMENTS = {"inside sqrt": "inside", "outside sqrt: x/(rms+eps)": "outside"}
_CASTS = {"after cast back to input dtype": "input", "in fp32 before cast back": "output"}


def is_attention(case: Case) -> bool:
    """Whether the case is a whole attention module, not a norm alone."""
    return "norm_over" in case.fields["hyper"]


def build_norm(case: Case) -> tuple[nn.Module, Map]:
    """Our norm for the case, and the map from the reference's parameters to ours."""
    op = case.manifest.content.get("op")
    if case.manifest.kind != "layer" or op not in _NORMS:
        raise NotImplementedCaseError(f"norm {op}")
    switches = Switches(case.fields["hyper"])
    recorded = matching(case.manifest.recorded, f"{case.name}/param.")
    params = {_NAMES.get(parameter, parameter) for _, parameter in recorded}
    module = _NORMS[op](switches, params, case.fields["shape"][-1])
    switches.done()
    return module, _to_ours


_NAMES = {"scale": "weight", "g": "weight", "offset": "bias"}


def _to_ours(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; a scalar has one element here."""
    return {
        _NAMES.get(name, name): value if value.ndim else value[None]
        for name, value in params.items()
    }


def _layernorm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    affine = {"elementwise_affine": "weight" in params, "bias": "bias" in params}
    return LayerNorm(dim, eps=switches.take("eps"), **affine)


def _rmsnorm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    placement = switches.take("eps_placement", "inside sqrt")
    if placement.startswith("x/max(||x||2"):
        return L2Norm(dim, eps=switches.take("eps"), length="sqrt_dim", gain="vector")
    if placement not in _EPS_PLACEMENTS:
        raise NotImplementedCaseError(f"eps_placement={placement!r}")
    offset = switches.take("weight_offset", 0.0)
    if offset not in (0.0, 1.0):
        raise NotImplementedCaseError(f"weight_offset={offset}")
    product = switches.take("weight_mul", "in fp32 before cast back")
    if product not in _CASTS:
        raise NotImplementedCaseError(f"weight_mul={product!r}")
    switches.expect("p", -1.0)
    switches.expect("bias", "bias" in params)
    return RMSNorm(
        dim,
        eps=switches.take("eps"),
        eps_placement=_EPS_PLACEMENTS[placement],
        elementwise_affine="weight" in params,
        unit_offset=bool(offset),
        bias="bias" in params,
        cast=_CASTS[product],
    )


def _prmsnorm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    switches.expect("eps_placement", "outside sqrt: x/(rms_k+eps)")
    norm = PRMSNorm(dim, p=switches.take("p"), eps=switches.take("eps"))
    switches.expect("k", norm.count)
    return norm


def _crmsnorm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    switches.expect("eps_placement", "inside sqrt")
    eps, compressed = switches.take("eps"), switches.take("denominator", None)
    if compressed not in (None, "D+1"):
        raise NotImplementedCaseError(f"denominator={compressed!r}")
    return CRMSNorm(dim, eps=eps) if compressed else RMSNorm(dim, eps=eps, elementwise_affine=False)


def _scalenorm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    eps = switches.take("eps")
    if switches.take("formula", "").startswith("x/max(||x||2"):
        return L2Norm(dim, eps=eps, length="sqrt_dim", gain="scalar")
    switches.expect("eps_placement", "g/max(||x||2,eps)")
    norm = ScaleNorm(dim, eps=eps)
    switches.expect("g_init", norm.weight_init)
    return norm


def _l2norm(switches: Switches, params: set[str], dim: int) -> nn.Module:
    switches.take("layout", None)  # the features are last in any
    switches.expect("normalised", "each group of head_dim/groups features to unit L2 norm")
    return L2Norm(dim, eps=switches.take("eps"), groups=switches.take("groups"))


def _dyt(switches: Switches, params: set[str], dim: int) -> nn.Module:
    return DyT(dim, alpha=switches.take("alpha_init"), bias=switches.take("bias"))


def _derf(switches: Switches, params: set[str], dim: int) -> nn.Module:
    alpha, shift = switches.take("alpha_init"), switches.take("shift_init")
    return Derf(dim, alpha=alpha, shift=shift, bias=switches.take("bias"))


_NORMS = {
    "LayerNorm": _layernorm,
    "RMSNorm": _rmsnorm,
    "pRMSNorm": _prmsnorm,
    "CRMSNorm": _crmsnorm,
    "ScaleNorm": _scalenorm,
    "QKNorm": _l2norm,
    "DyT": _dyt,
    "Derf": _derf,
}


@dataclass(kw_only=True)
class AttentionCase:
    """Our attention module for a case; `seen` holds what went through its q and k norms."""

    module: Attention
    theta: float
    seen: dict[str, Tensor]

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        rotary = {"rotary": self.table(x)}
        return functional_call(self.module, dict(params), (x,), rotary, strict=True)

    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1])[None]
        return rotary_table(
            positions, head_dim=self.module.head_dim, theta=self.theta, dtype=x.dtype
        )


def build_attention(case: Case) -> AttentionCase:
    """Our attention with norms on queries and keys, wired as the case says."""
    switches = Switches(case.fields["hyper"])
    over = switches.take("norm_over")
    switches.expect("causal", True)
    switches.expect("attention_scale", "head_dim**-0.5")
    offset = switches.take("weight_offset", 0.0)
    if offset not in (0.0, 1.0) or not over.startswith(("head_dim", "heads*head_dim")):
        raise NotImplementedCaseError(f"norm_over={over!r}, weight_offset={offset}")
    norm = NormSpec(
        op="rmsnorm",
        options={"eps": switches.take("eps"), "unit_offset": bool(offset)},
        per_head=over.startswith("head_dim"),
    )
    config = LlmNormConfig(
        hidden_size=case.fields["shape"][-1],
        num_attention_heads=switches.take("heads"),
        num_key_value_heads=switches.take("kv_heads"),
        head_dim=switches.take("head_dim"),
    )
    theta = switches.take("rope_theta")
    switches.done()
    config._attn_implementation = "sdpa"
    module = Attention(config, ResidualSpec(q=norm, k=norm), layer_idx=0).to(case.dtype)
    seen: dict[str, Tensor] = {}
    for name in ("q", "k"):
        getattr(module, f"{name}_norm").register_forward_hook(_watch(seen, name))
    return AttentionCase(module=module, theta=theta, seen=seen)


def _watch(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[f"{name}_in"], seen[f"{name}_out"] = inputs[0], output

    return hook
