"""Pieces of the maps from a reference's tensors to our state dict; all are differentiable."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..cases import Switches

Reference = Mapping[str, Tensor]

POSITIONS = 64
"""Rows of the recorded tables of learned positions."""


def copy(reference: Reference, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """The parameters of modules, {our name: the reference's name}, as far as they are there."""
    state = {}
    for ours, theirs in modules.items():
        for parameter in ("weight", "bias", "alpha", "shift"):
            if f"{theirs}.{parameter}" in reference:
                state[f"{ours}.{parameter}"] = reference[f"{theirs}.{parameter}"]
    return state


def split(reference: Reference, theirs: str, ours: Mapping[str, int]) -> dict[str, Tensor]:
    """The rows of a fused linear layer as several: {our name: number of rows}, in order."""
    state = {}
    for parameter in ("weight", "bias"):
        if f"{theirs}.{parameter}" in reference:
            parts = reference[f"{theirs}.{parameter}"].split(list(ours.values()))
            names = [f"{name}.{parameter}" for name in ours]
            state.update(zip(names, parts, strict=True))
    return state


def qkv(layer: str, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Rows of a fused projection [q; k; v]."""
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    return {f"{layer}.self_attn.{name}_proj": count for name, count in rows.items()}


def half_rotation(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection for RoPE on pairs (2i, 2i+1), reordered for pairs (i, i + dim/2)."""
    by_head = rows.unflatten(0, (-1, head_dim // 2, 2))
    return by_head.transpose(1, 2).reshape(rows.shape)


def rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our `rope_parameters`; scaled or partial RoPE is not implemented."""
    switches = Switches(given)
    theta = switches.take("rope_theta", 10000.0)
    switches.expect("rope_type", "default", None)
    switches.expect("partial_rotary_factor", 1.0, None)
    switches.done()
    return {"rope_theta": theta, "rope_type": "default"}
