"""NVIDIA's nGPT and its GPT baseline; what their code calls RoPE is not a rotation."""

from typing import Any

import torch
from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .mapping import copy, split

_MATRICES = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "att_c_proj",
    "mlp.down_proj": "mlp_c_proj",
    "attn_residual.pre": "rmsnorm_att",
    "mlp_residual.pre": "rmsnorm_mlp",
}
_VECTORS = {
    "attn_residual.first": "attn_alpha",
    "mlp_residual.first": "mlp_alpha",
    "self_attn.q_rotated": "sqk",
}


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("n_embd"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("n_layer"),
        "num_attention_heads": switches.take("n_head"),
    }
    spherical, base_scale = switches.take("use_nGPT", 1), switches.take("base_scale")
    switches.done()
    if spherical and base_scale != shape["hidden_size"] ** -0.5:
        raise NotImplementedCaseError(f"base_scale={base_scale!r}")
    if spherical:
        config = _as_the_code(build_config(shape, norm="l2norm", placement="ngpt"))
    else:
        norm = {"op": "rmsnorm", "eps": 1e-6}
        config = build_config(shape, norm=norm, placement="pre_ln", **case.overrides)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        names = {"model.embed_tokens": "transformer.wte", "lm_head": "lm_head"}
        state = copy(reference, {**names, "model.norm": "rmsnorm_f"})
        if "sz" in reference:
            state["logits.weight"] = reference["sz"]
        for i in range(config.num_hidden_layers):
            ffn = config.intermediate_size
            state |= _layer(reference, f"model.layers.{i}", f"transformer.h.{i}", ffn)
        return state

    return Stack(config=config, to_ours=to_ours, position=literal_rotary)


def _as_the_code(config: LlmNormConfig) -> LlmNormConfig:
    """Also normalize the embedding where the stream is stepped from, as the code does.

    The stream has length one everywhere else, up to rounding; attention reads it as it is.
    """

    def change(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
        if layer_idx == 0 and kind == "attn":
            return {**slots, "entry": slots["out"], "reads": "block"}
        return slots

    return rewire(config, change)


def _layer(reference: Reference, ours: str, theirs: str, ffn: int) -> dict[str, Tensor]:
    state = copy(reference, {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _MATRICES.items()})
    halves = {f"{ours}.mlp.up_proj": ffn, f"{ours}.mlp.gate_proj": ffn}  # the gate is the second
    state |= split(reference, f"{theirs}.c_fc", halves)
    if f"{theirs}.suv" in reference:
        up, gate = reference[f"{theirs}.suv"].split(ffn)
        state |= {f"{ours}.mlp.up.weight": up, f"{ours}.mlp.gate.weight": gate}
        state |= {f"{ours}.{a}.weight": reference[f"{theirs}.{b}"] for a, b in _VECTORS.items()}
    return state


def literal_rotary(
    query: Tensor, key: Tensor, table: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What the code does: out[2i] = -x[2i+1] C_i, out[2i+1] = x[2i] S_i.

    S and C are the halves of an interleaved table sin, cos, sin, cos, ...; the other two terms of a
    rotation are missing.
    """
    cos, sin = (part[:, None, :, : part.shape[-1] // 2] for part in table)
    first, second = torch.stack((sin, cos), dim=-1).flatten(-2).chunk(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2] * second, x[..., ::2] * first), dim=-1).flatten(-2)

    return turn(query), turn(key)
