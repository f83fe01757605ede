"""Classes with LayerNorm before each sublayer: StableLM, GPT-NeoX, Nemotron, OLMo."""

from dataclasses import dataclass

import torch

from llmnorm.export.canonical import eps_of, norm
from llmnorm.export.folds import fold_gains
from llmnorm.export.form import Form, Tensors, tables
from llmnorm.export.hosts.base import MLP, PRE_NORMS, QKV, QKVO, Host, Layout
from llmnorm.export.hosts.one_eps import eps

STABLELM = Host(
    name="stablelm",
    architecture="StableLmForCausalLM",
    norms=PRE_NORMS,
    holds="layernorm with placement pre_ln",
    placement="pre_ln",
    op="layernorm",
    norm_bias=True,
    partial_rotary=True,
    biases={"use_qkv_bias": QKV},
    eps_field="layer_norm_eps",
    fixed={"use_parallel_residual": False, "qk_layernorm": False},
    served="vLLM, llama.cpp",
)
GPT_NEOX = Host(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    norms=PRE_NORMS,
    holds="layernorm with placement pre_ln and a plain mlp",
    placement="pre_ln",
    op="layernorm",
    norm_bias=True,
    mlp="plain",
    partial_rotary=True,
    biases={"attention_bias": QKVO, "": ("up", "down")},
    eps_field="layer_norm_eps",
    fixed={"use_parallel_residual": False},
    layout=Layout(
        modules={
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        trunk={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
        },
        fused={"attention.query_key_value": tuple(f"self_attn.{n}_proj" for n in QKV)},
        by_head=True,
    ),
    served="vLLM, llama.cpp",
)
NEMOTRON = Host(
    name="nemotron",
    architecture="NemotronForCausalLM",
    norms=PRE_NORMS,
    holds="layernorm with placement pre_ln and a plain mlp",
    op="layernorm",
    norm_bias=True,
    unit_offset=True,
    mlp="plain",
    partial_rotary=True,
    biases={"attention_bias": QKVO, "mlp_bias": MLP},
    eps_field="norm_eps",
    served="vLLM, llama.cpp",
)


@dataclass(frozen=True, kw_only=True)
class Olmo(Host):
    """LayerNorm without parameters, eps 1e-5.

    A stream that is C times another gives the same to norms whose eps is C^2 times as large.
    """

    eps: float = 1e-5

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        fold_gains(form)
        held = [sub.get("pre") for sub in form.sublayers()] + [form.get_final()]
        if any(one is None or one.op != "layernorm" for one in held) or form.tied:
            return
        factor = (self.eps / eps(form)) ** 0.5
        for name in tables(form):
            form.tensors[name] = form.tensors[name] * factor
        for sub in form.sublayers():
            form.scale_rows(sub.writer, factor)
            pre = sub.get("pre")
            if pre is not None:
                eps_now = eps_of(pre) * factor**2
                sub.put("pre", norm(pre.op, eps_now, pre.tensors["weight"]))
        final = form.get_final()
        if final is not None:
            form.put_final(norm(final.op, self.eps, final.tensors["weight"]))

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """As in the base, without the norms' gains, which are 1."""
        norms = {f"{self.names(len(form.layers))[name]}.weight" for name in self.norm_modules(form)}
        tensors = super().write(form, dtype)
        return {name: tensor for name, tensor in tensors.items() if name not in norms}


OLMO = Olmo(
    name="olmo",
    architecture="OlmoForCausalLM",
    norms=PRE_NORMS,
    holds="layernorm without biases, with placement pre_ln",
    op="layernorm",
    biases={"attention_bias": QKVO},
    eps_field="",
    fixed={"clip_qkv": None},
    served="llama.cpp; vLLM by its transformers backend",
)
