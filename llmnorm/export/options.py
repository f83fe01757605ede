"""Options of a scheme that a refusal may advise: each is tried on the form's wiring.

What a changed form computes is another model; only whether a class could hold it is asked.
"""

from collections.abc import Callable

import torch

from llmnorm.export.canonical import norm
from llmnorm.export.form import Form, Held

_EPS = 1e-6


def _qk_norm(layout: str) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        head_dim = form.shape["head_dim"]
        heads = {"q": form.shape["num_attention_heads"], "k": form.shape["num_key_value_heads"]}
        for sub in form.sublayers():
            for slot, count in heads.items() if sub.kind == "attn" else ():
                width = head_dim * (count if layout == "full_width" else 1)
                held = _ones("rmsnorm", width, per_head=layout == "per_head")
                sub.put(slot, None if layout == "none" else held)

    return change


def _norm(op: str, *, bias: bool = False) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        for sub in form.sublayers():
            for slot in sub.spec.slots():
                if slot in _NORM_SLOTS:
                    width = len(_weight(sub.get(slot), form.hidden))
                    sub.put(slot, _ones(op, width, bias=bias))
        if form.final is not None:
            form.put_final(_ones(op, form.hidden, bias=bias))

    return change


def _embedding_norm(form: Form) -> None:
    held = _ones("rmsnorm", form.hidden)
    form.shape["embedding"] = {"treatment": "norm", "norm": held.spec.to_dict()}
    form.tensors["model.embedding_norm.weight"] = held.tensors["weight"]


def _without_biases(part: str) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        for name in [name for name in form.tensors if part in name and name.endswith("_proj.bias")]:
            del form.tensors[name]

    return change


def _position(position: str) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        form.shape["position"] = position

    return change


def _ones(op: str, dim: int, *, bias: bool = False, per_head: bool = False) -> Held:
    ones = torch.ones(dim, dtype=torch.float64)
    return norm(op, _EPS, ones, ones if bias else None, per_head=per_head)


def _weight(held: Held | None, dim: int) -> torch.Tensor:
    return torch.ones(dim) if held is None else held.tensors.get("weight", torch.ones(dim))


_NORM_SLOTS = ("entry", "pre", "post", "inner", "out")

OPTIONS: dict[str, Callable[[Form], None]] = {
    "qk_norm: none": _qk_norm("none"),
    "qk_norm: per_head": _qk_norm("per_head"),
    "qk_norm: full_width": _qk_norm("full_width"),
    "embedding: norm": _embedding_norm,
    "norm: rmsnorm": _norm("rmsnorm"),
    "norm: layernorm": _norm("layernorm", bias=True),
    "norm: {op: layernorm, bias: false}": _norm("layernorm"),
    "attention_bias: false": _without_biases(".self_attn."),
    "mlp_bias: false": _without_biases(".mlp."),
    "position: rope": _position("rope"),
    "position: learned": _position("learned"),
}
