"""Pre-RMSNorm's equivalence code: Pre-LN and Pre-RMSNorm without affine, and the re-centred one."""

from torch import Tensor

from llmnorm import build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack
from .mapping import add_positions, copy, qkv, split

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
        "position": "none",
    }
    norm = {**_NORMS[method], "eps": switches.take("eps")}
    switches.done()
    config = build_config(shape, norm=norm, placement="pre_ln", embedding="raw", **case.overrides)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        state = copy(reference, {"model.embed_tokens": "wte", "lm_head": "final_linear"})
        del state["lm_head.bias"]
        for i in range(config.num_hidden_layers):
            heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            layer = _layer(reference, f"model.layers.{i}", f"transformer.layers.{i}", heads)
            state |= {name: _centred(name, value, recentred) for name, value in layer.items()}
        return state

    def embed(tokens: Tensor, reference: Reference, ids: Tensor) -> Tensor:
        x = add_positions(tokens, reference["wpe.weight"], ids)
        return x - x.mean(-1, keepdim=True) if recentred else x

    return Stack(
        config=config,
        to_ours=to_ours,
        embed=embed,
        head_bias="final_linear.bias",
        blocks_per_layer=config.num_hidden_layers,  # hidden.1 is the last
    )


def _centred(name: str, value: Tensor, recentred: bool) -> Tensor:
    """What is added to the stream has zero mean over features: columns and biases of outputs."""
    is_output = ".o_proj." in name or ".down_proj." in name
    return value - value.mean(0) if recentred and is_output else value


def _layer(
    reference: Reference, ours: str, theirs: str, rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    names = {
        f"{ours}.self_attn.o_proj": f"{theirs}.1.to_out",
        f"{ours}.mlp.up_proj": f"{theirs}.3.net.0",
        f"{ours}.mlp.down_proj": f"{theirs}.3.net.2",
    }
    return copy(reference, names) | split(reference, f"{theirs}.1.to_qkv", qkv(ours, *rows))
