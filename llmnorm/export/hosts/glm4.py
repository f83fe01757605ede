"""Glm4: norms before and after each branch, gate and up in one matrix, RoPE of neighbours."""

from llmnorm.export.hosts.base import QKV, Host, Layout

GLM4 = Host(
    name="glm4",
    architecture="Glm4ForCausalLM",
    norms={
        ("attn", "pre"): "input_layernorm",
        ("attn", "post"): "post_self_attn_layernorm",
        ("mlp", "pre"): "post_attention_layernorm",
        ("mlp", "post"): "post_mlp_layernorm",
    },
    holds="rmsnorm with placement peri_ln or sandwich_ln",
    placement="sandwich_ln",  # Peri-LN with a raw embedding
    norm_options={"cast": "input"},
    interleaved=True,
    partial_rotary=True,
    biases={"attention_bias": QKV},
    layout=Layout(fused={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}),
    served="vLLM, llama.cpp",
)
