"""DyT's LLaMA: Pre-LN with DyT, a learned embedding scale, fused projections, interleaved RoPE."""

from torch import Tensor

from llmnorm import build_config

from ..cases import Case, Switches
from ..stack import Reference, Stack
from .mapping import copy, half_rotation, qkv, split


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    heads = switches.take("nheads")
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("emb_dim"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": switches.take("nlayers"),
        "num_attention_heads": heads,
        "num_key_value_heads": switches.take("kvheads", heads) or heads,
        "rope_parameters": {"rope_theta": switches.take("rope_theta", 10000.0)},
        "tie_word_embeddings": switches.take("tie_heads", False),
    }
    # Initial values of the alphas; the forward reads the learned ones.
    given = {"attn": "attn_alpha", "mlp": "ffn_alpha", "final": "dec_alpha"}
    alpha = {site: switches.take(name, None) for site, name in given.items()}
    norm = {"op": "dyt", "bias": False, "alpha": {s: a for s, a in alpha.items() if a is not None}}
    switches.done()
    overrides = {"embedding": {"treatment": "scale", "init": "sqrt_dim"}, **case.overrides}
    config = build_config(shape, norm=norm, placement="pre_ln", **overrides)
    rows = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        head = "shared.emb" if config.tie_word_embeddings else "shared.head"
        names = {
            "model.embed_tokens": "shared.emb",
            "lm_head": head,
            "model.norm": "dec_norm",
        }
        state = copy(reference, names)
        state["model.embedding_scale.weight"] = reference["shared_scale"]
        for i in range(config.num_hidden_layers):
            state |= _layer(reference, f"model.layers.{i}", f"layers.{i}", rows)
        return state

    return Stack(config=config, to_ours=to_ours)


def _layer(
    reference: Reference, ours: str, theirs: str, rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    names = {
        f"{ours}.attn_residual.pre": f"{theirs}.ln",
        f"{ours}.mlp_residual.pre": f"{theirs}.ff_ln",
        f"{ours}.self_attn.o_proj": f"{theirs}.attn.dense",
        f"{ours}.mlp.down_proj": f"{theirs}.ff_sub_layer.w2",
    }
    state = copy(reference, names)
    state |= split(reference, f"{theirs}.attn.in_proj.qkv_fused", qkv(ours, *rows))
    for name in (f"{ours}.self_attn.q_proj.weight", f"{ours}.self_attn.k_proj.weight"):
        state[name] = half_rotation(state[name], rows[-1])
    width = reference[f"{theirs}.ff_sub_layer.w2.weight"].shape[1]
    gate_up = {f"{ours}.mlp.gate_proj": width, f"{ours}.mlp.up_proj": width}
    return state | split(reference, f"{theirs}.ff_sub_layer.wg1_fused", gate_up)
