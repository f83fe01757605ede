"""Folds that some hosts want; each rewrites a simplified form in place into an equal one.

Sources: LayerNorm as RMSNorm of a centred stream: Jiang et al., 2023, arXiv:2305.14858.
"""

import torch

from llmnorm.export.canonical import eps_of, is_norm, norm
from llmnorm.export.form import HEAD, Form, Held, Sublayer, tables

NEUTRAL_EPS = 1e12


def centre_stream(form: Form) -> None:
    """Turn every LayerNorm of a Pre-LN form into an RMSNorm, by keeping the stream's mean at 0.

    Whatever writes to the stream loses its mean over features, so that subtracting it does nothing:
    the embedding's table (and that of positions), the output projections and their biases. Does
    nothing where the norms are not layernorms throughout, or where a sublayer does more than add.
    """
    held = [sub.get("pre") for sub in form.sublayers()] + [form.get_final()]
    if any(one is None or one.op != "layernorm" for one in held) or form.streams is not None:
        return
    if any(_joins(sub) - {"pre"} or sub.spec.module != "residual" for sub in form.sublayers()):
        return
    form.untie("the table is centred, the head is not")
    for name in tables(form):
        form.tensors[name] = _centred(form.tensors[name], 1)
    for sub in form.sublayers():
        name = sub.writer
        form.tensors[f"{name}.weight"] = _centred(form.weight(name), 0)
        if (bias := form.bias(name)) is not None:
            form.tensors[f"{name}.bias"] = _centred(bias, 0)
        sub.put("pre", _as_rmsnorm(sub.get("pre")))
    form.put_final(_as_rmsnorm(form.get_final()))


def fold_biases(form: Form) -> None:
    """Move the biases of the norms before branches into the linear layers that read them.

    The final norm keeps its bias: heads have none to take it.
    """
    for sub in form.sublayers():
        pre = sub.get("pre")
        if is_norm(pre) and pre is not None and "bias" in pre.tensors:
            for linear in sub.readers:
                form.add_bias(linear, form.weight(linear) @ pre.tensors["bias"])
            sub.put("pre", norm(pre.op, eps_of(pre), pre.tensors["weight"]))


def fold_gains(form: Form) -> None:
    """Move the gains of the norms before branches and head into the linear layers that read them.

    For hosts whose norms have no parameters. Biases must have been folded.
    """
    fold_branch_norm_gains(form)
    final = form.get_final()
    if is_norm(final) and final is not None and "bias" not in final.tensors:
        form.untie("the final norm's gain is in the head")
        form.scale_columns(HEAD, final.tensors["weight"])
        form.put_final(_without_gain(final))


def fold_branch_norm_gains(form: Form) -> None:
    """Move the gains of the norms before branches into the linear layers that read them."""
    for sub in form.sublayers():
        pre = sub.get("pre")
        if is_norm(pre) and pre is not None:
            for linear in sub.readers:
                form.scale_columns(linear, pre.tensors["weight"])
            sub.put("pre", _without_gain(pre))


def fold_pointwise(form: Form) -> None:
    """Move gain and bias of point-wise norms (DyT, Derf) into the linear layers that read them.

    What is left is tanh(alpha x), erf(alpha x + shift). The final norm keeps a bias, and then its
    gain too. Linear layers get biases.
    """
    for sub in form.sublayers():
        pre = sub.get("pre")
        if pre is None or not pre.spec.pointwise:
            continue
        weight, bias = _affine_of(pre)
        for linear in sub.readers:
            if bias is not None:
                form.add_bias(linear, form.weight(linear) @ bias)
            form.scale_columns(linear, weight)
        sub.put("pre", _bare(pre))
    final = form.get_final()
    if final is None or not final.spec.pointwise:
        return
    weight, bias = _affine_of(final)
    if bias is None:
        form.untie("the final norm's gain is in the head")
        form.scale_columns(HEAD, weight)
        form.put_final(_bare(final))


def fill_with_neutral_norms(form: Form) -> None:
    """Put rmsnorms that do nothing where a form without norms has none: gain sqrt(eps), eps 1e12.

    They err by mean(x^2) / 2e12, relative, and overflow in float16.
    """
    subs = list(form.sublayers())
    if form.final is not None or any(sub.spec.slots() for sub in subs):
        return
    neutral = norm(
        "rmsnorm", NEUTRAL_EPS, torch.full((form.hidden,), NEUTRAL_EPS**0.5, dtype=torch.float64)
    )
    for sub in subs:
        sub.put("pre", neutral)
    form.put_final(neutral)
    form.notes.append("the class's norms are made to do nothing (eps 1e12): load in float32")


def _joins(sub: Sublayer) -> set[str]:
    """The filled slots through which a sublayer meets the stream."""
    return {"entry", "pre", "post", "skip", "out", "first", "second"} & set(sub.spec.slots())


def _centred(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor - tensor.mean(dim, keepdim=True)


def _as_rmsnorm(held: Held | None) -> Held:
    assert held is not None
    return norm("rmsnorm", eps_of(held), held.tensors["weight"], held.tensors.get("bias"))


def _without_gain(held: Held) -> Held:
    return norm(held.op, eps_of(held), torch.ones_like(held.tensors["weight"]))


def _affine_of(held: Held) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gain and bias (dim,) of a point-wise norm, its constant in both; no bias if it is 0."""
    scale = held.spec.options.get("scale", 1.0)
    bias = held.tensors.get("bias")
    has_bias = bias is not None and bool(bias.any())
    return held.tensors["weight"] * scale, bias * scale if has_bias and bias is not None else None


def _bare(held: Held) -> Held:
    """A point-wise norm with gain 1 and bias 0."""
    tensors = dict(held.tensors)
    tensors["weight"] = torch.ones_like(tensors["weight"])
    if "bias" in tensors:
        tensors["bias"] = torch.zeros_like(tensors["bias"])
    options = {**held.spec.options, "scale": 1.0}
    return Held(held.spec.having(**options), tensors)
