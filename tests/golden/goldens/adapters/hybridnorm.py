"""HybridNorm's dense model on OLMo: norms on q, k, v and on the stream itself, by switches."""

import ast
from typing import Any

from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, Switches
from ..stack import Reference, Stack, rewire
from .mapping import copy, qkv, split

_QKV = {"q": "use_query_norm", "k": "use_key_norm", "v": "use_value_norm"}


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    heads = switches.take("n_heads")
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("d_model"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": switches.take("n_kv_heads", heads) or heads,
        "rope_parameters": {"rope_theta": switches.take("rope_theta", 10000.0)},
    }
    norm = {"op": "rmsnorm", "eps": switches.take("eps"), "cast": "output"}
    on = {slot: switches.take(name) for slot, name in _QKV.items()}
    layers = layer_switches(switches, shape["num_hidden_layers"])
    switches.done()
    config = _wiring(shape, norm, on, layers, case.overrides)
    rows = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        names = {
            "model.embed_tokens": "transformer.wte",
            "lm_head": "transformer.ff_out",
            "model.norm": "transformer.ln_f",
        }
        state = copy(reference, names)
        for i in range(config.num_hidden_layers):
            state |= _layer(reference, i, _slots(layers[i]), rows)
        return state

    return Stack(config=config, to_ours=to_ours)


def layer_switches(switches: Switches, depth: int) -> list[dict[str, bool]]:
    """Where the norms of each layer stand; `norm_pos_special_config` overrides single layers."""
    common = {
        "attn_norm": switches.take("attn_norm"),
        "ffn_norm": switches.take("ffn_norm"),
        "attn_residual": switches.take("attn_residual_after_norm"),
        "ffn_residual": switches.take("ffn_residual_after_norm"),
    }
    special = ast.literal_eval(switches.take("norm_pos_special_config", "{}").strip("_") or "{}")
    layers = [{**common, **special.get(i, {})} for i in range(depth)]
    for layer in layers:
        own = Switches(layer)
        for name in common:
            own.expect(name, True, False)
        own.done()
    return layers


def _slots(layer: dict[str, bool]) -> dict[str, str]:
    """The slot of each sublayer's norm: `entry` where the residual is taken after it."""
    return {
        kind: "entry" if layer[f"{name}_residual"] else "pre"
        for kind, name in (("attn", "attn"), ("mlp", "ffn"))
        if layer[f"{name}_norm"]
    }


def _wiring(
    shape: dict[str, Any],
    norm: dict[str, Any],
    on: dict[str, bool],
    layers: list[dict[str, bool]],
    overrides: dict[str, Any],
) -> LlmNormConfig:
    """HybridNorm, HybridNorm* and Pre-LN with qk-norm are ours by name; the rest is wired."""
    placed = {"norm": norm, **overrides}
    wired = [_slots(layer) for layer in layers]
    pre, entry = {"attn": "pre", "mlp": "pre"}, {"mlp": "entry"}
    if all(on.values()) and wired == [entry] * len(layers):
        return build_config(shape, placement="hybrid_norm", **placed)
    if all(on.values()) and wired == [pre] + [entry] * (len(layers) - 1):
        return build_config(shape, placement="hybrid_norm_star", **placed)
    qk = {"layout": "per_head", **norm}
    config = build_config(shape, placement="pre_ln", qk_norm=qk, **placed)
    if on == {"q": True, "k": True, "v": False} and all(slots == pre for slots in wired):
        return config

    def change(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
        held = {slot: norm for k, slot in _slots(layers[layer_idx]).items() if k == kind}
        if kind == "attn":
            held |= {slot: {**norm, "per_head": True} for slot in on if on[slot]}
        return held

    return rewire(config, change)


def _layer(
    reference: Reference, layer_idx: int, slots: dict[str, str], rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    ours, theirs = f"model.layers.{layer_idx}", f"transformer.blocks.{layer_idx}"
    names = {f"{ours}.self_attn.{slot}_norm": f"{theirs}.{slot}_norm" for slot in _QKV}
    for kind, name in (("attn", "attn_norm"), ("mlp", "ff_norm")):
        if kind in slots:
            names[f"{ours}.{kind}_residual.{slots[kind]}"] = f"{theirs}.{name}"
    names[f"{ours}.self_attn.o_proj"] = f"{theirs}.attn_out"
    names[f"{ours}.mlp.down_proj"] = f"{theirs}.ff_out"
    state = copy(reference, names) | split(reference, f"{theirs}.att_proj", qkv(ours, *rows))
    width = reference[f"{theirs}.ff_out.weight"].shape[1]
    up_gate = {f"{ours}.mlp.up_proj": width, f"{ours}.mlp.gate_proj": width}
    return state | split(reference, f"{theirs}.ff_proj", up_gate)
