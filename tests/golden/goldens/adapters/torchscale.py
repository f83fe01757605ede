"""Microsoft's torchscale: DeepNorm, Sub-LN, Pre-LN and Post-LN by three independent switches."""

from typing import Any

from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .mapping import copy

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    deepnorm = switches.take("deepnorm", False)
    subln = switches.take("subln", True) and not deepnorm  # torchscale's default, and its rule
    pre = switches.take("decoder_normalize_before", True)
    depth = switches.take("layers")
    act = switches.take("activation_fn", "gelu")
    if act not in _ACTIVATIONS:
        raise NotImplementedCaseError(f"activation_fn={act!r}")
    shape = {
        "vocab_size": switches.take("vocab_size"),
        "hidden_size": switches.take("embed_dim"),
        "intermediate_size": switches.take("ffn"),
        "num_hidden_layers": depth,
        "num_attention_heads": switches.take("heads"),
        "attention_bias": True,
        "mlp_bias": True,
        "mlp": "plain",
        "hidden_act": _ACTIVATIONS[act],
        "position": "none",
    }
    norm = {"op": "layernorm", "eps": switches.take("eps")}
    alpha = switches.take("alpha", (2 * depth) ** 0.25)
    switches.take("beta_init", None)
    switches.take("scale_on_v_out_fc", None)
    switches.done()
    overrides = {"embedding": "raw", **case.overrides}
    config = _wiring(shape, norm, overrides, deepnorm=deepnorm, subln=subln, pre=pre, alpha=alpha)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        ends = {"model.embed_tokens": "embed_tokens", "lm_head": "output_projection"}
        state = copy(reference, {**ends, "model.norm": "layer_norm"})
        for i in range(depth):
            names = _layer(f"model.layers.{i}", f"layers.{i}", "pre" if pre else "out")
            state |= copy(reference, names)
        return state

    return Stack(config=config, to_ours=to_ours)


def _wiring(
    shape: dict[str, Any],
    norm: dict[str, Any],
    overrides: dict[str, Any],
    *,
    deepnorm: bool,
    subln: bool,
    pre: bool,
    alpha: float,
) -> LlmNormConfig:
    """One of our placements where the switches mean one, else a hand-made wiring."""
    placement = {
        (False, False): "post_ln",
        (False, True): "deepnorm",
        (True, False): "sub_ln" if subln else "pre_ln",
        (True, True): "pre_ln",
    }[pre, deepnorm]
    config = build_config(shape, norm=norm, placement=placement, **overrides)
    if deepnorm and (pre or alpha != (2 * shape["num_hidden_layers"]) ** 0.25):
        skip = {"op": "constant", "value": alpha}
        return rewire(config, lambda i, kind, slots: {**slots, "skip": skip})
    if subln and not pre:
        return rewire(config, lambda i, kind, slots: {**slots, "inner": norm})
    return config


def _layer(ours: str, theirs: str, slot: str) -> dict[str, str]:
    attention = {
        f"{ours}.self_attn.{name}_proj": f"{theirs}.self_attn.{name}_proj" for name in "qkv"
    }
    return attention | {
        f"{ours}.self_attn.o_proj": f"{theirs}.self_attn.out_proj",
        f"{ours}.self_attn.inner": f"{theirs}.self_attn.inner_attn_ln",
        f"{ours}.attn_residual.{slot}": f"{theirs}.self_attn_layer_norm",
        f"{ours}.mlp.up_proj": f"{theirs}.ffn.fc1",
        f"{ours}.mlp.inner": f"{theirs}.ffn.ffn_layernorm",
        f"{ours}.mlp.down_proj": f"{theirs}.ffn.fc2",
        f"{ours}.mlp_residual.{slot}": f"{theirs}.final_layer_norm",
    }
