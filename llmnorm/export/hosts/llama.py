"""Llama, Qwen3 and their kin: RMSNorm before each sublayer, norms on queries and keys or none."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from llmnorm.export.folds import centre_stream
from llmnorm.export.form import Form
from llmnorm.export.hosts.base import PRE_NORMS, QK_NORMS, Host, check_default_rope


@dataclass(frozen=True, kw_only=True)
class LlamaLike(Host):
    """Pre-LN with RMSNorm; a LayerNorm that reads a centred stream is one."""

    def prepare(self, form: Form) -> None:
        centre_stream(form)
        super().prepare(form)

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        biased = {"attention_bias": form.has_bias("attn"), "mlp_bias": form.has_bias("mlp")}
        return {name: value for name, value in biased.items() if value}

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        known: Any = config
        return {
            "norm": {"op": "rmsnorm", "eps": known.rms_norm_eps, "cast": "input"},
            "placement": "pre_ln",
            "qk_norm": "none",
            "rope_theta": check_default_rope(config),
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3(LlamaLike):
    """The same with a norm on each head's queries and keys."""

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        known: Any = config
        norm = {"op": "rmsnorm", "eps": known.rms_norm_eps, "cast": "input"}
        return {**super().scheme(config), "qk_norm": {"layout": "per_head", **norm}}


LLAMA = LlamaLike(
    name="llama",
    architecture="LlamaForCausalLM",
    norms=PRE_NORMS,
    biases=frozenset(("attn", "mlp")),
    served="vLLM, SGLang, TGI, llama.cpp",
)
QWEN3 = Qwen3(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    norms={**PRE_NORMS, **QK_NORMS},
    biases=frozenset(("attn",)),
    served="vLLM, SGLang, llama.cpp",
)
