"""Gemma 2 and 3: norms before and after each branch, gains stored less 1, a scaled embedding."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.export.form import EMBEDDING, Form, Tensors
from llmnorm.export.hosts.base import QK_NORMS, QKVO, Host, Place, check_default_rope
from llmnorm.export.simplify import bake_embedding

_SCALE = "model.embedding_scale"
_NORMS: dict[Place, str] = {
    ("attn", "pre"): "input_layernorm",
    ("attn", "post"): "post_attention_layernorm",
    ("mlp", "pre"): "pre_feedforward_layernorm",
    ("mlp", "post"): "post_feedforward_layernorm",
}
_FIXED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


@dataclass(frozen=True, kw_only=True)
class Gemma(Host):
    """Peri-LN whose table is multiplied by sqrt(hidden_size), rounded to the weights' dtype."""

    def prepare(self, form: Form) -> None:
        if form.embedding.treatment == "norm":
            bake_embedding(form)
        super().prepare(form)
        if form.shape["hidden_act"] != "gelu_pytorch_tanh":
            form.notes.append(
                f"hidden_act is {form.shape['hidden_act']}: transformers takes it, but code that "
                f"serves {self.architecture} may expect gelu_pytorch_tanh"
            )

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        return {"query_pre_attn_scalar": form.shape["head_dim"]}

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """As in the base; a tied head undoes in the final norm what is done to the table."""
        form = form.copy()
        factor = form.tensors.pop(f"{_SCALE}.weight", torch.ones(1, dtype=torch.float64))
        factor = factor / _rounded_root(form.hidden, dtype)
        form.tensors[f"{EMBEDDING}.weight"] = form.weight(EMBEDDING) * factor
        if form.tied:
            form.tensors["model.norm.weight"] = form.tensors["model.norm.weight"] / factor
        return super().write(form, dtype)

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        scheme = super().scheme(config)
        return {**scheme, "embedding": {"treatment": "scale", "init": "sqrt_dim"}}

    def read(self, model: PreTrainedModel) -> Tensors:
        """As in the base; a scalar of attention that is not head_dim is put into the queries."""
        config: Any = model.config
        tensors = super().read(model)
        scalar = (config.head_dim / config.query_pre_attn_scalar) ** 0.5
        for name in tensors if scalar != 1 else ():
            if ".q_norm." in name:
                tensors[name] = (1 + tensors[name]) * scalar - 1
            elif ".q_proj." in name and ("attn", "q") not in self.norms:
                tensors[name] = tensors[name] * scalar
        # Unrounded, as the class has it in float64; cast with the weights, it is rounded as theirs.
        scale = torch.tensor([config.hidden_size**0.5], dtype=torch.float64)
        return {**tensors, f"{_SCALE}.weight": scale}


@dataclass(frozen=True, kw_only=True)
class Gemma3(Gemma):
    """The same, with a RoPE for each kind of layer."""

    def rope(self, theta: float) -> dict[str, Any]:
        return {kind: super(Gemma3, self).rope(theta) for kind in _KINDS}

    def rope_theta(self, config: Any) -> float:
        """The base of RoPE, which must be the same in every layer."""
        rope = config.rope_parameters
        bases = {kind: check_default_rope(rope[kind]) for kind in sorted(set(config.layer_types))}
        if len(set(bases.values())) > 1:
            raise ValueError(f"rope_theta is {bases} by layer type; llmnorm has one for all layers")
        return next(iter(bases.values()))


_KINDS = ("full_attention", "sliding_attention")


def _rounded_root(hidden: int, dtype: torch.dtype) -> float:
    """sqrt(hidden) as a class that is loaded in the weights' dtype rounds it."""
    return float(torch.tensor(hidden**0.5, dtype=dtype))


GEMMA2 = Gemma(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    norms=_NORMS,
    holds="rmsnorm with placement peri_ln or sandwich_ln",
    placement="sandwich_ln",
    norm_options={"unit_offset": True},
    unit_offset=True,
    embedding="scale",
    biases={"attention_bias": QKVO},
    renamed={"hidden_act": "hidden_activation"},
    fixed=_FIXED,
    served="vLLM, llama.cpp (GeGLU alone, unverified)",
)
GEMMA3 = Gemma3(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    norms={**_NORMS, **QK_NORMS},
    holds="rmsnorm with placement peri_ln or sandwich_ln, and qk_norm per_head",
    placement="sandwich_ln",
    norm_options={"unit_offset": True},
    unit_offset=True,
    embedding="scale",
    biases={"attention_bias": QKVO},
    renamed={"hidden_act": "hidden_activation"},
    fixed=_FIXED,
    served="vLLM, llama.cpp (GeGLU alone, unverified)",
)
