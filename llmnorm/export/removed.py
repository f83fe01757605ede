"""Fold norms that were removed by training (`FixedStd`): each has become a matrix.

Dividing by a constant is a gain, and taking the mean away is a matrix too, so a linear layer that
reads such a norm reads the stream as well. Read `conversion/removal.py` for how a model gets there.
"""

import torch

from llmnorm.export.form import HEAD, Form, Held, Sublayer

OP = "fixed_std"


def fold_removed_norms(form: Form) -> None:
    """Move each removed norm before a branch or the head into the matrices that read it, in place.

    One that still normalizes stays, and so does a final one with a bias, which no head can take.
    """
    for sub in form.sublayers():
        pre = sub.get("pre")
        if pre is not None and pre.op == OP and obstacle(pre) is None:
            _fold_before(sub, pre)
    final = form.get_final()
    if final is None or final.op != OP or obstacle(final) or has_bias(final):
        return
    form.untie("what the final norm has become is in its matrix")
    form.tensors[f"{HEAD}.weight"] = _reading(form.weight(HEAD), final)
    form.put_final(None)


def obstacle(held: Held) -> str | None:
    """What keeps a FixedStd from being a matrix, in words; None if nothing does."""
    if not bool(held.tensors["removed"]):
        return "is not removed yet"
    if not torch.equal(held.tensors["std"], held.tensors["std_first"]):
        return "still has another constant for position 0"
    return None


def has_bias(held: Held) -> bool:
    """Whether there is a bias that is not 0."""
    return "bias" in held.tensors and bool(held.tensors["bias"].any())


def _fold_before(sub: Sublayer, pre: Held) -> None:
    for linear in sub.readers:
        if has_bias(pre):
            bias = pre.spec.options["scale"] * pre.tensors["bias"]
            sub.form.add_bias(linear, sub.form.weight(linear) @ bias)
        sub.form.tensors[f"{linear}.weight"] = _reading(sub.form.weight(linear), pre)
    sub.put("pre", None)


def _reading(weight: torch.Tensor, held: Held) -> torch.Tensor:
    """The matrix (out, in) that reads the stream as `weight` read what the norm made of it."""
    gain = held.spec.options["scale"] * held.tensors["weight"] / held.tensors["std"]
    read = weight * gain
    return read - read.mean(1, keepdim=True) if held.spec.options["centre"] else read
