"""SiameseNorm's two releases: the hybrid on OLMo, and the plain block for vision."""

from typing import Any

from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .hybridnorm import layer_switches
from .mapping import copy, qkv, split

_STAR = {"attn_norm": True, "ffn_norm": True, "attn_residual": False, "ffn_residual": False}
_HYBRID = {"attn_norm": False, "ffn_norm": True, "attn_residual": False, "ffn_residual": True}


def hybrid(case: Case) -> Stack:
    """The language model; its divisor is sqrt(2 l)."""
    switches = Switches(case.fields["config"])
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("d_model"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("n_layers"),
        "num_attention_heads": switches.take("n_heads"),
        "num_key_value_heads": switches.take("n_kv_heads"),
        "rope_parameters": {"rope_theta": switches.take("rope_theta")},
    }
    norm = {"op": "rmsnorm", "eps": switches.take("eps"), "cast": "output"}
    for name in ("use_query_norm", "use_key_norm", "use_value_norm"):
        switches.expect(name, True)
    switches.expect("use_context_norm", False)
    layers = layer_switches(switches, shape["num_hidden_layers"])
    switches.done()
    star = layers[0] == _STAR
    if any(layer != _HYBRID for layer in layers[star:]):
        raise NotImplementedCaseError(f"norms at {layers}")
    placement = {"name": "siamese_norm", "variant": "hybrid", "damping": 2.0, "star": star}
    config = build_config(shape, norm=norm, placement=placement)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        names = {
            "model.embed_tokens": "transformer.wte",
            "model.streams.first": "transformer.ln_f",
            "model.streams.second": "transformer.ln_y_f",
            "model.norm": "transformer.ln_final_f",
            "lm_head": "transformer.ff_out",
        }
        state = copy(reference, names)
        for i in range(config.num_hidden_layers):
            state |= _hybrid_layer(reference, i, config, star=star and i == 0)
        return state

    return Stack(config=config, to_ours=to_ours)


def _hybrid_layer(
    reference: Reference, layer_idx: int, config: LlmNormConfig, *, star: bool
) -> dict[str, Tensor]:
    ours, theirs = f"model.layers.{layer_idx}", f"transformer.blocks.{layer_idx}"
    names = {f"{ours}.self_attn.{slot}_norm": f"{theirs}.{slot}_norm" for slot in "qkv"}
    names |= {
        f"{ours}.attn_residual.first": f"{theirs}.attn_norm",
        f"{ours}.attn_residual.second": f"{theirs}.attn_y_norm",
        f"{ours}.self_attn.o_proj": f"{theirs}.attn_out",
        f"{ours}.mlp_residual.{'first' if star else 'entry'}": f"{theirs}.ff_norm",
        f"{ours}.mlp_residual.second": f"{theirs}.ff_y_norm",
        f"{ours}.mlp_residual.pre": f"{theirs}.ff_input_norm",
        f"{ours}.mlp.down_proj": f"{theirs}.ff_out",
    }
    state = copy(reference, names)
    if not star:
        state[f"{ours}.attn_residual.first.weight"] = reference[f"{theirs}.c1"]
    rows = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    state |= split(reference, f"{theirs}.att_proj", qkv(ours, *rows))
    ffn = config.intermediate_size
    halves = {f"{ours}.mlp.up_proj": ffn, f"{ours}.mlp.gate_proj": ffn}  # the gate is the second
    return state | split(reference, f"{theirs}.ff_proj", halves)


def deit(case: Case) -> Stack:
    """The plain block: hidden states in, both streams out, every position sees all others.

    Its norm of the first stream stands at the start of the next sublayer instead of the end.
    """
    switches = Switches(case.fields["config"])
    width = switches.take("embed_dim")
    shape = {
        "vocab_size": 2,
        "hidden_size": width,
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("layers"),
        "num_attention_heads": switches.take("heads"),
        "attention_bias": True,
        "mlp_bias": True,
        "mlp": "plain",
        "hidden_act": "gelu",
        "position": "none",
    }
    norm = {"op": "layernorm", "eps": switches.take("eps")}
    switches.done()
    placement = {"name": "siamese_norm", "damping": 2.0}

    def change(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
        return {("entry" if slot == "out" else slot): held for slot, held in slots.items()}

    config = rewire(build_config(shape, norm=norm, placement=placement), change)
    config.streams = {"scale": 1.0}

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        some = next(iter(reference.values()))
        unread = ("model.embed_tokens.weight", "lm_head.weight")
        state = {name: some.new_zeros(2, width) for name in unread}
        for i in range(config.num_hidden_layers):
            state |= _deit_layer(reference, f"model.layers.{i}", f"blocks.{i}", config)
        return state

    return Stack(config=config, to_ours=to_ours, blocks_only=True)


def _deit_layer(
    reference: Reference, ours: str, theirs: str, config: LlmNormConfig
) -> dict[str, Tensor]:
    names = {
        f"{ours}.{kind}_residual.{slot}": f"{theirs}.{name}_norm{number}"
        for kind, number in (("attn", 1), ("mlp", 2))
        for slot, name in (("entry", "post"), ("second", "pre"), ("pre", "input"))
    }
    names |= {
        f"{ours}.self_attn.o_proj": f"{theirs}.attn.proj",
        f"{ours}.mlp.up_proj": f"{theirs}.mlp.fc1",
        f"{ours}.mlp.down_proj": f"{theirs}.mlp.fc2",
    }
    rows = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return copy(reference, names) | split(reference, f"{theirs}.attn.qkv", qkv(ours, *rows))
