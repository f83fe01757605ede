"""Llama, Qwen 3, OLMo 2, Gemma 2 and Gemma 3 as in transformers: each is one of our placements."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack
from .mapping import copy, rope

PRE = {"attn_residual.pre": "input_layernorm", "mlp_residual.pre": "post_attention_layernorm"}
POST = {
    "attn_residual.post": "post_attention_layernorm",
    "mlp_residual.post": "post_feedforward_layernorm",
}
PERI = {
    "attn_residual.pre": "input_layernorm",
    "mlp_residual.pre": "pre_feedforward_layernorm",
    **POST,
}


_GAINS = ("norm.weight", "_residual.pre.weight", "_residual.post.weight")


def llama(case: Case) -> Stack:
    return _stack(case, PRE, norm={"cast": "input"}, placement="pre_ln")


def qwen3(case: Case) -> Stack:
    return _stack(case, PRE, norm={"cast": "input"}, placement="pre_ln", qk="per_head")


def olmo2(case: Case) -> Stack:
    return _stack(case, POST, norm={}, placement="res_post_ln", qk="full_width")


def gemma2(case: Case) -> Stack:
    return _gemma(case)


def gemma3(case: Case) -> Stack:
    return _gemma(case, qk="per_head")


def llama_names(
    reference: Reference, config: LlmNormConfig, slots: Callable[[int], Mapping[str, str]]
) -> dict[str, Tensor]:
    """The state of a model with Llama's names; `slots(i)` says which norm is which of ours."""
    embedding = "model.embed_tokens"
    head = embedding if config.tie_word_embeddings else "lm_head"
    state = copy(reference, {embedding: embedding, "lm_head": head, "model.norm": "model.norm"})
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        own = (f"{layer}.self_attn.", f"{layer}.mlp.")
        state |= {name: value for name, value in reference.items() if name.startswith(own)}
        state |= copy(
            reference, {f"{layer}.{ours}": f"{layer}.{theirs}" for ours, theirs in slots(i).items()}
        )
    return state


def _shape(case: Case, switches: Switches) -> dict[str, Any]:
    """Shape fields of our config; what the forward does not depend on is passed over."""
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
    for name in ("num_key_value_heads", "head_dim"):
        shape[name] = switches.take(name, None)
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        shape[name] = switches.take(name, False)
    act = switches.take("hidden_act", None)
    shape["hidden_act"] = switches.take("hidden_activation", None) or act or "silu"
    switches.expect("attention_dropout", 0.0)
    switches.expect("pad_token_id", None)  # a padding row would get no gradient
    for name in ("max_position_embeddings", "initializer_range", "use_cache"):
        switches.take(name, None)
    for name in ("bos_token_id", "eos_token_id"):
        switches.take(name, None)
    return shape | {"rope_parameters": _positions(case, switches)}


def _positions(case: Case, switches: Switches) -> dict[str, Any]:
    """RoPE and the attention window, which must be one for all layers and reach everything."""
    kinds = set(switches.take("layer_types", None) or [])
    window = switches.take("sliding_window", None)
    if "sliding_attention" in kinds and window is not None and window < case.seq_len:
        raise NotImplementedCaseError(f"sliding_window={window} below {case.seq_len} tokens")
    for name in ("use_sliding_window", "max_window_layers"):
        switches.take(name, None)
    given = switches.take("rope_parameters", None)
    if given is None:
        return rope({"rope_theta": switches.take("rope_theta", 10000.0)})
    if "rope_theta" in given or "rope_type" in given:
        return rope(given)
    used = [rope(given[kind]) for kind in given if kind in kinds or not kinds]
    if any(other != used[0] for other in used):
        raise NotImplementedCaseError(f"several rope_parameters {given}")
    return used[0]


def _config(
    case: Case, switches: Switches, norm: dict[str, Any], placement: str, qk: str, **overrides: Any
) -> LlmNormConfig:
    rmsnorm = {"eps": switches.take("rms_norm_eps"), **norm}
    overrides["qk_norm"] = "none" if qk == "none" else {"layout": qk, **rmsnorm}
    shape = _shape(case, switches)
    switches.done()
    chosen = {"embedding": "raw", **overrides, **case.overrides}
    return build_config(shape, norm={"op": "rmsnorm", **rmsnorm}, placement=placement, **chosen)


def _stack(
    case: Case, slots: dict[str, str], norm: dict[str, Any], placement: str, qk: str = "none"
) -> Stack:
    config = _config(case, Switches(case.fields["config"]), norm, placement, qk)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        return llama_names(reference, config, lambda _: slots)

    return Stack(config=config, to_ours=to_ours)


def _gemma(case: Case, qk: str = "none") -> Stack:
    """Peri-LN with gains 1 + weight, embedding times sqrt(width), queries by their own scale."""
    switches = Switches(case.fields["config"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        switches.expect(name, None)
    switches.expect("use_bidirectional_attention", None, False)
    query_scalar = switches.take("query_pre_attn_scalar", None)
    scale = {"treatment": "scale", "init": "sqrt_dim"}
    config = _config(case, switches, {}, "peri_ln", qk, embedding=scale)
    factor = (config.head_dim / (query_scalar or config.head_dim)) ** 0.5

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        state = llama_names(reference, config, lambda _: PERI)
        for name, value in state.items():
            if value.ndim == 1 and name.endswith(_GAINS):
                state[name] = 1 + value
        queries = "q_proj." if qk == "none" else "q_norm."
        for name in [name for name in state if queries in name]:
            state[name] = factor * state[name]
        table = state["model.embed_tokens.weight"]
        state["model.embedding_scale.weight"] = torch.full_like(table[0, :1], table.shape[1] ** 0.5)
        return state

    return Stack(config=config, to_ours=to_ours)
