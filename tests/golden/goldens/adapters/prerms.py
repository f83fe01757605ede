"""Pre-RMSNorm's equivalence code: Pre-LN and Pre-RMSNorm without affine, and the re-centred one."""

from torch import Tensor

from llmnorm import build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack
from .mapping import POSITIONS, copy, qkv, split

_PLAIN = {"elementwise_affine": False}
_NORMS = {
    "pre-ln": {"op": "layernorm", **_PLAIN},
    "pre-customized-ln": {"op": "layernorm", **_PLAIN},
    "pre-rms": {"op": "rmsnorm", **_PLAIN},
    "pre-crms-same-dim": {"op": "crmsnorm"},
}


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    method, recentred = switches.take("method"), switches.take("pre_rms_training", False)
    if method not in _NORMS:
        raise NotImplementedCaseError(f"method={method!r}")
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("dim"),
        "intermediate_size": switches.take("mlp"),
        "num_hidden_layers": switches.take("layers"),
        "num_attention_heads": switches.take("heads"),
        "attention_bias": True,
        "mlp_bias": True,
        "mlp": "plain",
        "hidden_act": "gelu",
        "position": "learned",
        "max_position_embeddings": POSITIONS,
    }
    norm = {**_NORMS[method], "eps": switches.take("eps")}
    switches.done()
    config = build_config(shape, norm=norm, placement="pre_ln", embedding="raw", **case.overrides)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        tables = copy(reference, {"model.embed_tokens": "wte", "model.embed_positions": "wpe"})
        state = {name: _centred(table, -1, recentred) for name, table in tables.items()}
        state["lm_head.weight"] = reference["final_linear.weight"]
        for i in range(config.num_hidden_layers):
            heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            layer = _layer(reference, f"model.layers.{i}", f"transformer.layers.{i}", heads)
            outputs = [name for name in layer if ".o_proj." in name or ".down_proj." in name]
            layer |= {name: _centred(layer[name], 0, recentred) for name in outputs}
            state |= layer
        return state

    return Stack(
        config=config,
        to_ours=to_ours,
        head_bias="final_linear.bias",
        blocks_per_layer=config.num_hidden_layers,  # hidden.1 is the last
    )


def _centred(value: Tensor, features: int, recentred: bool) -> Tensor:
    """What is added to the stream, with zero mean over its axis of features."""
    return value - value.mean(features, keepdim=True) if recentred else value


def _layer(
    reference: Reference, ours: str, theirs: str, rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    names = {
        f"{ours}.self_attn.o_proj": f"{theirs}.1.to_out",
        f"{ours}.mlp.up_proj": f"{theirs}.3.net.0",
        f"{ours}.mlp.down_proj": f"{theirs}.3.net.2",
    }
    return copy(reference, names) | split(reference, f"{theirs}.1.to_qkv", qkv(ours, *rows))
