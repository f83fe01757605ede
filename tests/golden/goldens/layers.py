"""Layer cases: the reference's hyper-parameters as one of our norms or attention modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmnorm.modeling.attention import Attention
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.norms import Derf, DyT, LayerNorm, RMSNorm
from llmnorm.modeling.residual import NormSpec, ResidualSpec
from llmnorm.modeling.rotary import rotary_table

from .cases import Case, Map, NotImplementedCaseError, Switches, matching

_CASTS = {"after cast back to input dtype": "input", "in fp32 before cast back": "output"}


def is_attention(case: Case) -> bool:
    return case.manifest.content.get("op") == "QKNorm"


def build_norm(case: Case) -> tuple[nn.Module, Map]:
    """Our norm for the case, and the map from the reference's parameters to ours."""
    op = case.manifest.content.get("op")
    if case.manifest.kind != "layer" or op not in _NORMS:
        raise NotImplementedCaseError(f"norm {op}")
    switches = Switches(case.fields["hyper"])
    recorded = matching(case.manifest.recorded, f"{case.name}/param.")
    params = {parameter for _, parameter in recorded}
    module, to_ours = _NORMS[op](switches, params, case.fields["shape"][-1])
    switches.done()
    return module, to_ours


def _as_they_are(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(params)


def _one_plus_weight(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gemma multiplies by 1 + weight, in float32 or higher."""
    weight = params["weight"]
    return {"weight": 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))}


def _layernorm(switches: Switches, params: set[str], dim: int) -> tuple[nn.Module, Map]:
    affine = {"elementwise_affine": "weight" in params, "bias": "bias" in params}
    return LayerNorm(dim, eps=switches.take("eps"), **affine), _as_they_are


def _rmsnorm(switches: Switches, params: set[str], dim: int) -> tuple[nn.Module, Map]:
    switches.expect("eps_placement", "inside sqrt")
    offset = switches.take("weight_offset", 0.0)
    if offset not in (0.0, 1.0):
        raise NotImplementedCaseError(f"weight_offset={offset}")
    product = switches.take("weight_mul", "in fp32 before cast back")
    if product not in _CASTS:
        raise NotImplementedCaseError(f"weight_mul={product!r}")
    norm = RMSNorm(
        dim,
        eps=switches.take("eps"),
        elementwise_affine="weight" in params,
        cast=_CASTS[product],
    )
    return norm, _one_plus_weight if offset else _as_they_are


def _dyt(switches: Switches, params: set[str], dim: int) -> tuple[nn.Module, Map]:
    return DyT(dim, alpha=switches.take("alpha_init"), bias=switches.take("bias")), _as_they_are


def _derf(switches: Switches, params: set[str], dim: int) -> tuple[nn.Module, Map]:
    alpha, shift = switches.take("alpha_init"), switches.take("shift_init")
    return Derf(dim, alpha=alpha, shift=shift, bias=switches.take("bias")), _as_they_are


_NORMS = {"LayerNorm": _layernorm, "RMSNorm": _rmsnorm, "DyT": _dyt, "Derf": _derf}


@dataclass(kw_only=True)
class AttentionCase:
    """Our attention module for a case; `seen` holds what went through its q and k norms."""

    module: Attention
    theta: float
    weight_offset: bool
    seen: dict[str, Tensor]

    def parameters(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The names are ours already; Gemma 3 multiplies by 1 + weight."""
        offset = {"q_norm.weight", "k_norm.weight"} if self.weight_offset else set()
        return {name: 1 + value if name in offset else value for name, value in params.items()}

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        rotary = self.table(x)
        state = self.parameters(params)
        return functional_call(self.module, state, (x,), {"rotary": rotary}, strict=True)

    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1])[None]
        return rotary_table(
            positions, head_dim=self.module.head_dim, theta=self.theta, dtype=x.dtype
        )


def build_attention(case: Case) -> AttentionCase:
    """Our attention with norms on queries and keys, wired as the case says."""
    switches = Switches(case.fields["hyper"])
    if "norm_over" not in case.fields["hyper"]:
        raise NotImplementedCaseError("L2 norm of queries and keys")
    over = switches.take("norm_over")
    switches.expect("causal", True)
    switches.expect("attention_scale", "head_dim**-0.5")
    offset = switches.take("weight_offset", 0.0)
    if offset not in (0.0, 1.0) or not over.startswith(("head_dim", "heads*head_dim")):
        raise NotImplementedCaseError(f"norm_over={over!r}, weight_offset={offset}")
    norm = NormSpec(
        op="rmsnorm",
        options={"eps": switches.take("eps")},
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
    return AttentionCase(module=module, theta=theta, weight_offset=bool(offset), seen=seen)


def _watch(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[f"{name}_in"], seen[f"{name}_out"] = inputs[0], output

    return hook
