"""fairseq's decoder layers with NormFormer's or ResiDual's switches: hidden states in and out."""

from typing import Any

import torch
from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .mapping import copy

_ACTIVATIONS = {"gelu (exact)": "gelu", "gelu": "gelu", "relu": "relu"}


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    dual = switches.take("residual_dual", False)
    activation = switches.take("activation")
    if activation not in _ACTIVATIONS:
        raise NotImplementedCaseError(f"activation={activation!r}")
    width, heads = switches.take("embed_dim"), switches.take("heads")
    shape = {
        "vocab_size": width,  # the head is an identity
        "hidden_size": width,
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("layers"),
        "num_attention_heads": heads,
        "attention_bias": True,
        "mlp_bias": True,
        "mlp": "plain",
        "hidden_act": _ACTIVATIONS[activation],
        "position": "none",
    }
    norm = {"op": "layernorm", "eps": switches.take("eps")}
    pre = switches.take("normalize_before")
    scales = {
        name: switches.take(f"scale_{name}", False) for name in ("attn", "fc", "heads", "resids")
    }
    config = _dual(shape, norm, switches) if dual else _wiring(shape, norm, pre, scales)
    switches.done()
    head_gain = "inner" in (config.residuals or [])[0]["attn"]

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        some = next(iter(reference.values()))
        state = {"model.embed_tokens.weight": some.new_zeros(width, width)}
        state["lm_head.weight"] = torch.eye(width, dtype=some.dtype)
        state |= copy(reference, {"model.streams.second": "layer_norm"})
        for i in range(config.num_hidden_layers):
            layer = _layer(reference, f"model.layers.{i}", f"layers.{i}", "pre" if pre else "out")
            if head_gain:  # ours stands before the output projection; the reference's is folded
                layer[f"model.layers.{i}.self_attn.inner.weight"] = some.new_ones(heads)
            state |= layer
        return state

    return Stack(config=config, to_ours=to_ours, time_first=True)


def _dual(shape: dict[str, Any], norm: dict[str, Any], switches: Switches) -> LlmNormConfig:
    """ResiDual's; the eps of its last norm is ours without being asked for."""
    placement = {
        "name": "residual_dual",
        "scale": switches.take("dec_res_input_norm_scale"),
        "alpha": switches.take("dec_alpha"),
    }
    switches.expect("final_layer_norm_eps", 1e-7)
    return build_config(shape, norm=norm, placement=placement)


def _wiring(
    shape: dict[str, Any], norm: dict[str, Any], pre: bool, scales: dict[str, bool]
) -> LlmNormConfig:
    """Placement `normformer` where all its parts are on, else its parts one by one."""
    if pre and scales["attn"] and scales["fc"] and scales["heads"]:
        placement = {"name": "normformer", "res_scale": scales["resids"]}
        return rewire(build_config(shape, norm=norm, placement=placement), final_norm=None)

    def change(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
        if kind == "attn" and scales["attn"]:
            slots["post"] = norm
        if kind == "mlp" and scales["fc"]:
            slots["inner"] = norm
        if kind == "mlp" and scales["resids"]:
            slots["skip"] = {"op": "gain"}
        return slots

    config = build_config(shape, norm=norm, placement="pre_ln" if pre else "post_ln")
    return rewire(config, change, final_norm=None)


def _layer(reference: Reference, ours: str, theirs: str, slot: str) -> dict[str, Tensor]:
    names = {f"{ours}.self_attn.{name}_proj": f"{theirs}.self_attn.{name}_proj" for name in "qkv"}
    names |= {
        f"{ours}.self_attn.o_proj": f"{theirs}.self_attn.out_proj",
        f"{ours}.attn_residual.{slot}": f"{theirs}.self_attn_layer_norm",
        f"{ours}.attn_residual.post": f"{theirs}.attn_ln",
        f"{ours}.mlp.up_proj": f"{theirs}.fc1",
        f"{ours}.mlp.inner": f"{theirs}.ffn_layernorm",
        f"{ours}.mlp.down_proj": f"{theirs}.fc2",
        f"{ours}.mlp_residual.{slot}": f"{theirs}.final_layer_norm",
    }
    state = copy(reference, names)
    if f"{theirs}.c_attn" in reference:  # acts on the output of out_proj, a block of rows a head
        weight, bias = (f"{ours}.self_attn.o_proj.{name}" for name in ("weight", "bias"))
        gain = reference[f"{theirs}.c_attn"]
        rows = gain.repeat_interleave(len(state[bias]) // len(gain))
        state |= {weight: rows[:, None] * state[weight], bias: rows * state[bias]}
    if f"{theirs}.w_resid" in reference:
        state[f"{ours}.mlp_residual.skip.weight"] = reference[f"{theirs}.w_resid"]
    return state
