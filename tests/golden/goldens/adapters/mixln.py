"""The LLaMA code of Mix-LN and LayerNorm Scaling: one `norm_type` chooses the wiring."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .hf import PERI, PRE, llama_names

OUT = {
    "attn_residual.out": "post_attention_layernorm",
    "mlp_residual.out": "post_feedforward_layernorm",
}
# The repositories' constant for deeppost: (2 * 32)^(1/4), whatever the depth.
FIXED_ALPHA = 64**0.25


def lns(case: Case) -> Stack:
    """A case of the LayerNorm-Scaling repository that does not repeat its norm type."""
    config = {"norm_type": "LNS", **case.fields["config"]}
    return adapt(replace(case, fields={**case.fields, "config": config}))


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    kind, post_num = switches.take("norm_type"), switches.take("post_num", 0)
    shape, norm = take_llama(switches)
    switches.done()
    config, slots = _wiring(kind, post_num, shape, norm, {"embedding": "raw", **case.overrides})

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        state = llama_names(reference, config, lambda i: slots[i])
        if kind == "scale_res_pre_norm":
            state |= _branch_gains(reference, config)
        return state

    return Stack(config=config, to_ours=to_ours)


def take_llama(switches: Switches) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shape and norm of the LLaMA code that these repositories share."""
    shape = {
        name: switches.take(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    shape["hidden_act"] = switches.take("hidden_act", "silu")
    shape["tie_word_embeddings"] = switches.take("tie_word_embeddings", False)
    shape["rope_parameters"] = {"rope_theta": switches.take("rope_theta", 10000.0)}
    return shape, {"op": "rmsnorm", "eps": switches.take("rms_norm_eps"), "cast": "input"}


def mix_ln(post_num: int, depth: int) -> dict[str, Any]:
    """Our Mix-LN with this number of Post-LN layers."""
    return {"name": "mix_ln", "fraction": min((post_num + 0.5) / depth, 1.0)}


def _wiring(
    kind: str,
    post_num: int,
    shape: dict[str, Any],
    norm: dict[str, Any],
    overrides: dict[str, Any],
) -> tuple[LlmNormConfig, list[Mapping[str, str]]]:
    """Our config and, layer by layer, the names of its norms."""
    depth = shape["num_hidden_layers"]

    def built(placement: Any) -> LlmNormConfig:
        return build_config(shape, norm=norm, placement=placement, **overrides)

    if kind == "pre":
        return built("pre_ln"), [PRE] * depth
    if kind.lower() in ("lns", "cod"):
        return built("lns"), [PRE] * depth
    if kind == "sandwich":
        return built("sandwich_ln"), [PERI] * depth
    if kind == "post_pre":
        names = [OUT if i < post_num else PRE for i in range(depth)]
        return built(mix_ln(post_num, depth)), names
    if kind == "post":  # Post-LN, but the norm before the head stays: Mix-LN with nothing but post
        return built(mix_ln(depth, depth)), [OUT] * depth
    if kind == "deeppost":
        return rewire(built("deepnorm"), _fixed_alpha, final_norm=norm), [OUT] * depth
    if kind == "scale_res_pre_norm":
        return rewire(built("pre_ln"), _branch_gain), [PRE] * depth
    if kind == "post_pre_post_pre":
        is_pre = [(i + 1) % 4 == 0 for i in range(depth)]
        wiring = rewire(built("pre_ln"), lambda i, _, slots: slots if is_pre[i] else {"out": norm})
        return wiring, [PRE if pre else OUT for pre in is_pre]
    raise NotImplementedCaseError(f"norm_type={kind!r}")


def _fixed_alpha(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
    return {**slots, "skip": {"op": "constant", "value": FIXED_ALPHA}}


def _branch_gain(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
    """A learned scalar on each branch; our gain has one number a feature, all equal here."""
    return {**slots, "post": {"op": "gain", "value": 0.001}}


def _branch_gains(reference: Reference, config: LlmNormConfig) -> dict[str, Tensor]:
    return {
        f"model.layers.{i}.{kind}_residual.post.weight": reference[
            f"model.layers.{i}.raw_scaling_factor_{kind}"
        ].expand(config.hidden_size)
        for i in range(config.num_hidden_layers)
        for kind in ("attn", "mlp")
    }
