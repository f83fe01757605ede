"""BitNet without quantization: norms before each sublayer and before its output projection."""

from llmnorm.export.hosts.base import PRE_NORMS, QKVO, Host

BITNET = Host(
    name="bitnet",
    architecture="BitNetForCausalLM",
    norms={
        **PRE_NORMS,
        ("attn", "inner"): "self_attn.attn_sub_norm",
        ("mlp", "inner"): "mlp.ffn_sub_norm",
    },
    holds="rmsnorm with placement sub_ln",
    placement="sub_ln",
    norm_options={"cast": "input"},
    biases={"attention_bias": QKVO},
)
