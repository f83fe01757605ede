"""MiniMax with one expert: Post-LN and DeepNorm, whose embedding must be normalized.

A layer of the class normalizes, then adds twice: what is the norm after a block for us is the norm
at the start of the next one for it, and the last is the final norm.
"""

from dataclasses import dataclass
from typing import Any

import torch

from llmnorm.export.canonical import canonical, eps_of, gain, is_norm, norm
from llmnorm.export.form import Form, Sublayer, Tensors
from llmnorm.export.hosts.base import Host, Layout
from llmnorm.export.hosts.one_eps import embedding_norm


@dataclass(frozen=True, kw_only=True)
class MiniMax(Host):
    """y = N(alpha x + f(x)), alpha one number for all attention sublayers and one for all mlps."""

    def prepare(self, form: Form) -> None:
        super().prepare(form)
        _write_embedding_norm_plainly(form)
        for kind in ("attn", "mlp"):
            subs = [sub for sub in form.sublayers() if sub.kind == kind]
            alphas = {sub.index: _alpha(sub) for sub in subs}
            for sub in subs:
                if None not in alphas.values():
                    _rescale(sub, alphas[sub.index] or 1.0, to=alphas[0] or 1.0)

    def more_obstacles(self, form: Form) -> list[str]:
        several = any(_alpha(sub) is None for sub in form.sublayers())
        return ["multiplies the skip by one number, the model each feature by its own"] * several

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        attn, mlp = (_alpha(Sublayer(form, 0, kind)) for kind in ("attn", "mlp"))
        return {"full_attn_alpha_factor": attn, "mlp_alpha_factor": mlp}

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """As in the base; the mlp is an expert, and a router of 0 always chooses it."""
        form = form.copy()
        for sub in form.sublayers():
            sub.put("skip", None)
        tensors = {}
        for name, tensor in super().write(form, dtype).items():
            expert = ".experts." in name
            tensors[name.removesuffix(".weight") if expert else name] = (
                tensor.unsqueeze(0) if expert else tensor
            )
        router = torch.zeros(1, form.hidden, dtype=torch.float64)
        names = [f"model.layers.{i}.mlp.gate.weight" for i in range(len(form.layers))]
        return {**tensors, **{name: router.clone() for name in names}}

    def names(self, layers: int) -> dict[str, str]:
        names = super().names(layers)
        for i in range(layers):
            ours, last = f"model.layers.{i}.mlp_residual.out", i == layers - 1
            names[ours] = "model.norm" if last else f"model.layers.{i + 1}.input_layernorm"
        return {**names, "model.embedding_norm": "model.layers.0.input_layernorm"}


def _alpha(sub: Sublayer) -> float | None:
    """What multiplies the skip; None where it is not one number."""
    held = sub.get("skip")
    if held is None:
        return 1.0
    weight = held.tensors.get("weight")
    uniform = held.op == "gain" and weight is not None and bool((weight == weight[0]).all())
    return float(weight[0]) if uniform and weight is not None else None


def _rescale(sub: Sublayer, alpha: float, *, to: float) -> None:
    """N(alpha x + f) is N(to x + f to / alpha), with eps (to / alpha)^2."""
    out = sub.get("out")
    if alpha == to or out is None or not is_norm(out):
        return
    ratio = to / alpha
    weight = out.tensors["weight"] * (1.0 if ratio > 0 else -1.0)
    sub.form.scale_rows(sub.writer, ratio)
    sub.put("skip", gain(torch.full((sub.form.hidden,), to, dtype=torch.float64)))
    sub.put("out", norm(out.op, eps_of(out) * ratio**2, weight, out.tensors.get("bias")))


def _write_embedding_norm_plainly(form: Form) -> None:
    held = embedding_norm(form)
    plain = None if held is None else canonical(held, form.hidden)
    if plain is not None:
        form.drop("model.embedding_norm")
        form.shape["embedding"] = {"treatment": "norm", "norm": plain.spec.to_dict()}
        for part, tensor in plain.tensors.items():
            form.tensors[f"model.embedding_norm.{part}"] = tensor


MINIMAX = MiniMax(
    name="minimax",
    architecture="MiniMaxForCausalLM",
    norms={("attn", "out"): "post_attention_layernorm", ("mlp", "out"): "input_layernorm"},
    holds="rmsnorm with placement post_ln or deepnorm, and embedding norm",
    final=False,
    embedding="norm",
    gains=frozenset({("attn", "skip"), ("mlp", "skip")}),
    fixed={"num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": None},
    layout=Layout(
        modules={"mlp.down_proj": "mlp.experts.down_proj"},
        fused={"mlp.experts.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
    layerwise=False,
)
