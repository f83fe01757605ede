"""Classes whose attention and mlp read the same: one LayerNorm for both, or one each."""

from dataclasses import dataclass, replace

import torch

from llmnorm.export.folds import fold_biases, fold_branch_norm_gains
from llmnorm.export.form import HEAD, Form, Sublayer, Tensors
from llmnorm.export.hosts.base import QKVO, Host, Layout, Place
from llmnorm.export.hosts.layernorm import GPT_NEOX, STABLELM

_ONE_NORM: dict[Place, str] = {
    ("attn", "pre"): "input_layernorm",
    ("mlp", "pre"): "input_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class OneNorm(Host):
    """A parallel block with one norm: two norms become one when gain and bias are in matrices.

    Args:
        head_bias: whether the head has a bias; 0 is written.
    """

    head_bias: bool = False

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        if any(not _same(form, i) for i in range(len(form.layers))):
            fold_biases(form)
            fold_branch_norm_gains(form)

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """As in the base, with the head's bias."""
        tensors = super().write(form, dtype)
        if self.head_bias:
            tensors[f"{HEAD}.bias"] = torch.zeros(form.shape["vocab_size"], dtype=torch.float64)
        return tensors


def _same(form: Form, index: int) -> bool:
    """Whether attention and mlp of a layer have one norm."""
    attn, mlp = Sublayer(form, index, "attn").get("pre"), Sublayer(form, index, "mlp").get("pre")
    if attn is None or mlp is None or attn.tensors.keys() != mlp.tensors.keys():
        return attn is mlp
    return all(torch.equal(attn.tensors[part], mlp.tensors[part]) for part in attn.tensors)


COHERE = OneNorm(
    name="cohere",
    architecture="CohereForCausalLM",
    norms=_ONE_NORM,
    holds="layernorm without biases, with placement parallel",
    op="layernorm",
    parallel=True,
    interleaved=True,
    biases={"attention_bias": QKVO},
    eps_field="layer_norm_eps",
    fixed={"logit_scale": 1.0, "use_qk_norm": False},
    served="vLLM, llama.cpp",
)
PHI = OneNorm(
    name="phi",
    architecture="PhiForCausalLM",
    norms=_ONE_NORM,
    holds="layernorm with placement parallel and a plain mlp",
    op="layernorm",
    norm_bias=True,
    parallel=True,
    head_bias=True,
    mlp="plain",
    partial_rotary=True,
    biases={"": (*QKVO, "up", "down")},
    eps_field="layer_norm_eps",
    fixed={"qk_layernorm": False},
    layout=Layout(
        modules={
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
        trunk={"model.norm": "model.final_layernorm"},
    ),
    served="vLLM, llama.cpp",
)
STABLELM_PARALLEL = OneNorm(
    name="stablelm_parallel",
    architecture=STABLELM.architecture,
    norms=_ONE_NORM,
    holds="layernorm with placement parallel",
    op="layernorm",
    norm_bias=True,
    parallel=True,
    partial_rotary=True,
    biases=STABLELM.biases,
    eps_field=STABLELM.eps_field,
    fixed={"use_parallel_residual": True, "qk_layernorm": False},
    served=STABLELM.served,
)
GPT_NEOX_PARALLEL = replace(
    GPT_NEOX,
    name="gpt_neox_parallel",
    holds="layernorm with placement parallel and a plain mlp",
    placement=None,
    parallel=True,
    fixed={"use_parallel_residual": True},
)
