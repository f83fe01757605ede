"""GPT-2: LayerNorm before each sublayer, learned positions, a plain mlp, matrices (in, out)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from llmnorm.export.canonical import norm
from llmnorm.export.folds import NEUTRAL_EPS
from llmnorm.export.form import HEAD, Form
from llmnorm.export.hosts.base import QKV, QKVO, Host, Layout

_POSITIONS = "model.embed_positions.weight"
_ROUNDING = 1e-10


@dataclass(frozen=True, kw_only=True)
class GPT2(Host):
    """GPT-2; without positions its table of them is 0."""

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        if form.shape["position"] == "none":
            rows = form.shape["max_position_embeddings"]
            form.tensors[_POSITIONS] = torch.zeros(rows, form.hidden, dtype=torch.float64)
            form.shape["position"] = "learned"
        fill_with_neutral_layernorms(form)

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        return {"resid_pdrop": 0.0, "embd_pdrop": 0.0}

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        scheme = super().scheme(config)
        if scheme["intermediate_size"] is None:
            known: Any = config
            scheme["intermediate_size"] = 4 * known.hidden_size
        return scheme


def fill_with_neutral_layernorms(form: Form) -> None:
    """Put layernorms that only take the mean away where a form without norms does not read it.

    Such are models whose norms were removed by fine-tuning: each became a matrix, which starts with
    taking the mean away. Gain sqrt(eps), eps 1e12.
    """
    subs = list(form.sublayers())
    if form.final is not None or any(sub.spec.slots() for sub in subs):
        return
    readers = [name for sub in subs for name in sub.readers] + [HEAD]
    if any(form.weight(name).sum(1).abs().max() > _ROUNDING for name in readers):
        return
    weight = torch.full((form.hidden,), NEUTRAL_EPS**0.5, dtype=torch.float64)
    for sub in subs:
        sub.put("pre", norm("layernorm", NEUTRAL_EPS, weight))
    form.put_final(norm("layernorm", NEUTRAL_EPS, weight))
    form.notes.append("the class's norms are made to do nothing (eps 1e12): load in float32")


GPT_2 = GPT2(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    norms={("attn", "pre"): "ln_1", ("mlp", "pre"): "ln_2"},
    holds="layernorm with placement pre_ln, position learned and a plain mlp",
    placement="pre_ln",
    op="layernorm",
    norm_bias=True,
    mlp="plain",
    position="learned",
    biases={"": (*QKVO, "up", "down")},
    eps_field="layer_norm_epsilon",
    renamed={
        "hidden_act": "activation_function",
        "intermediate_size": "n_inner",
        "attention_dropout": "attn_pdrop",
    },
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    layout=Layout(
        modules={
            **{f"self_attn.{name}_proj": f"attn.{name}_proj" for name in QKV},
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        trunk={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
        },
        fused={"attn.c_attn": tuple(f"self_attn.{name}_proj" for name in QKV)},
        transposed=True,
    ),
    served="vLLM, llama.cpp",
)
