"""Llama and its kin: RMSNorm before each sublayer, norms on queries and keys or none."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.export.form import Form, Tensors
from llmnorm.export.hosts.base import MLP, PRE_NORMS, QK_NORMS, QKV, QKVO, Host

_CAST = {"cast": "input"}  # as these classes multiply by the weight

LLAMA = Host(
    name="llama",
    architecture="LlamaForCausalLM",
    norms=PRE_NORMS,
    holds="rmsnorm with placement pre_ln",
    placement="pre_ln",
    norm_options=_CAST,
    biases={"attention_bias": QKVO, "mlp_bias": MLP},
    served="vLLM, llama.cpp",
)
MISTRAL = Host(
    name="mistral",
    architecture="MistralForCausalLM",
    norms=PRE_NORMS,
    holds="rmsnorm with placement pre_ln, no biases",
    placement="pre_ln",
    norm_options=_CAST,
    fixed={"sliding_window": None},
    served="vLLM, llama.cpp (unverified)",
)
QWEN2 = Host(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    norms=PRE_NORMS,
    holds="rmsnorm with placement pre_ln, biases on q, k and v",
    placement="pre_ln",
    norm_options=_CAST,
    biases={"": QKV},
    served="vLLM, llama.cpp (unverified)",
)
QWEN3 = Host(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    norms={**PRE_NORMS, **QK_NORMS},
    holds="rmsnorm with placement pre_ln and qk_norm per_head",
    placement="pre_ln",
    norm_options=_CAST,
    biases={"attention_bias": QKVO},
    served="vLLM, llama.cpp",
)


@dataclass(frozen=True, kw_only=True)
class Granite(Host):
    """Llama with the multipliers of muP, which are in matrices when written."""

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        return {**dict.fromkeys(ones, 1.0), "attention_multiplier": form.shape["head_dim"] ** -0.5}

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        scheme = super().scheme(config)
        return {**scheme, "embedding": {"treatment": "scale", "init": "sqrt_dim"}}

    def read(self, model: PreTrainedModel) -> Tensors:
        """As in the base; the multipliers are put into matrices and the final norm's gain."""
        config: Any = model.config
        tensors = super().read(model)
        head_dim = config.hidden_size // config.num_attention_heads
        factors = {
            ".q_proj": config.attention_multiplier * head_dim**0.5,
            ".o_proj": config.residual_multiplier,
            ".down_proj": config.residual_multiplier,
            "model.norm": 1 / config.logits_scaling,
        }
        for name in tensors:
            for end, factor in factors.items():
                if name.rpartition(".")[0].endswith(end):
                    tensors[name] = tensors[name] * factor
        scale = torch.tensor([config.embedding_multiplier], dtype=torch.float64)
        return {**tensors, "model.embedding_scale.weight": scale}


GRANITE = Granite(
    name="granite",
    architecture="GraniteForCausalLM",
    norms=PRE_NORMS,
    holds="rmsnorm with placement pre_ln",
    placement="pre_ln",
    norm_options=_CAST,
    biases={"attention_bias": QKVO, "mlp_bias": MLP},
    served="vLLM, llama.cpp",
)
