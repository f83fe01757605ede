"""Olmo2 and Exaone4: norms on what branches give, and on queries and keys."""

from llmnorm.export.hosts.base import QK_NORMS, QKVO, Host, Place

_POST_NORMS: dict[Place, str] = {
    ("attn", "post"): "post_attention_layernorm",
    ("mlp", "post"): "post_feedforward_layernorm",
}

OLMO2 = Host(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    norms={**_POST_NORMS, **QK_NORMS},
    holds="rmsnorm with placement res_post_ln and qk_norm full_width",
    placement="res_post_ln",
    qk_per_head=False,
    biases={"attention_bias": QKVO},
    served="llama.cpp; vLLM by its transformers backend",
)
EXAONE4 = Host(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    norms={**_POST_NORMS, **QK_NORMS},
    holds="rmsnorm with placement res_post_ln and qk_norm per_head",
    placement="res_post_ln",
    norm_options={"cast": "input"},
    fixed={"sliding_window": None},  # with a window, layers of full attention have no RoPE
    served="vLLM, llama.cpp",
)
