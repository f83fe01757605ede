"""Derf's GPT-2: Pre-LN with Derf, DyT or LayerNorm, learned positions, one matrix for both ends."""

from typing import Any

from torch import Tensor

from llmnorm import build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack
from .mapping import POSITIONS, copy, qkv, split

# nanoGPT's LayerNorm has its eps in the code.
_EPS = 1e-5


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    kind, bias = switches.take("norm_type"), switches.take("bias", False)
    switches.expect("dropout", 0.0)
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("n_embd"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("n_layer"),
        "num_attention_heads": switches.take("n_head"),
        "attention_bias": bias,
        "mlp_bias": bias,
        "mlp": "plain",
        "hidden_act": "gelu",
        "position": "learned",
        "max_position_embeddings": switches.take("block_size", POSITIONS),
        "tie_word_embeddings": True,
    }
    norms: dict[str, dict[str, Any]] = {
        "derf": {"op": "derf", "bias": True},
        "dyt": {"op": "dyt", "bias": True},
        "ln": {"op": "layernorm", "bias": bias, "eps": switches.take("eps", _EPS)},
    }
    if kind not in norms:
        raise NotImplementedCaseError(f"norm_type={kind!r}")
    switches.done()
    scale = "raw" if kind == "ln" else {"treatment": "scale", "init": "sqrt_dim"}
    overrides = {"embedding": scale, **case.overrides}
    config = build_config(shape, norm=norms[kind], placement="pre_ln", **overrides)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        ends = dict.fromkeys(("model.embed_tokens", "lm_head"), "transformer.wte")
        ends |= {"model.embed_positions": "transformer.wpe", "model.norm": "transformer.ln_f"}
        state = copy(reference, ends)
        if kind != "ln":
            state["model.embedding_scale.weight"] = reference["shared_scale"]
        for i in range(config.num_hidden_layers):
            heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            state |= _layer(reference, f"model.layers.{i}", f"transformer.h.{i}", heads)
        return state

    return Stack(config=config, to_ours=to_ours)


def _layer(
    reference: Reference, ours: str, theirs: str, rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    names = {
        f"{ours}.attn_residual.pre": f"{theirs}.ln_1",
        f"{ours}.mlp_residual.pre": f"{theirs}.ln_2",
        f"{ours}.self_attn.o_proj": f"{theirs}.attn.c_proj",
        f"{ours}.mlp.up_proj": f"{theirs}.mlp.c_fc",
        f"{ours}.mlp.down_proj": f"{theirs}.mlp.c_proj",
    }
    return copy(reference, names) | split(reference, f"{theirs}.attn.c_attn", qkv(ours, *rows))
