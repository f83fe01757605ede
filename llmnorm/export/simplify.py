"""Folds that every host wants: whatever can be part of a matrix becomes part of it.

Each function rewrites a form in place into one that computes the same. `simplify` is all of them.
"""

import torch

from llmnorm.export.canonical import canonical, eps_of, gain, is_norm, norm
from llmnorm.export.form import HEAD, Form, Held, Sublayer, tables
from llmnorm.export.removed import fold_removed_norms

_ONE_STREAM = ("residual", "lerp", "bhyt")


def simplify(form: Form, *, embedding: bool = True) -> Form:
    """A copy of a form in which constants, gains and the embedding's treatment are in matrices.

    Norms are plain (`canonical.py`) with their constants in their gains. What is left in the slots
    is what a host must have.

    Args:
        embedding: whether its treatment goes into the table; some hosts want to see it.
    """
    form = form.copy()
    fold_removed_norms(form)
    write_plainly(form)
    if embedding:
        bake_embedding(form)
    fold_logits(form)
    for sub in form.sublayers():
        fold_branch_gains(sub)
    return fold_stream_gains(form)


def write_plainly(form: Form) -> None:
    """Write every slot as rmsnorm, layernorm or gain where it is one; no slot is shared."""
    for sub in form.sublayers():
        for slot, spec in sub.spec.slots().items():
            if spec.shared:  # attention stands before the mlp, and is written plainly already
                held = Sublayer(form, sub.index, "attn").get(slot)
            else:
                held = canonical(Held(spec, form.parts(sub.module_name(slot))), _width(sub, slot))
            sub.put(slot, held)
    if (final := form.get_final()) is not None:
        held = canonical(final, form.hidden)
        if held is not None and held.op == "gain":
            form.untie("what multiplies the final hidden state is in its matrix")
            form.scale_columns(HEAD, held.tensors["weight"])
            held = None
        form.put_final(held)


def bake_embedding(form: Form) -> None:
    """Replace the embedding's table by what its treatment makes of each row.

    A norm of the sum of tokens and learned positions is in neither table, and stays.
    """
    spec = form.embedding
    if spec.treatment == "raw" or (spec.norm is not None and len(tables(form)) > 1):
        return
    form.untie(f"the embedding's {spec.treatment} is in its table")
    for name in tables(form):
        table = form.tensors[name]
        if spec.norm is not None:
            held = Held(spec.norm, form.parts("model.embedding_norm"))
            with torch.no_grad():
                table = held.module(form.hidden)(table)
        else:
            table = table * form.tensors["model.embedding_scale.weight"]
        form.tensors[name] = table
    form.drop("model.embedding_norm")
    form.drop("model.embedding_scale")
    form.shape["embedding"] = "raw"


def fold_logits(form: Form) -> None:
    """Multiply the head's rows by what multiplies the logits."""
    if form.logits is None:
        return
    held = canonical(Held(form.logits, form.parts("logits")), form.shape["vocab_size"])
    if held is not None and held.op != "gain":
        return
    if held is not None:
        form.untie("what multiplies the logits is in its matrix")
        form.scale_rows(HEAD, held.tensors["weight"])
    form.drop("logits")
    form.logits = None


def fold_branch_gains(sub: Sublayer) -> None:
    """Multiply matrices by the gains beside them: before and after each projection."""
    form = sub.form
    move_before_rotation(sub)
    for slot in ("q", "k", "v", "gate", "up"):
        if (weight := _gain(sub, slot)) is not None:
            rows = form.weight(sub.linear(slot)).shape[0]
            form.scale_rows(sub.linear(slot), weight.repeat(rows // len(weight)))
            sub.put(slot, None)
    for slot in ("pre", "inner", "post"):
        if (weight := _gain(sub, slot)) is None:
            continue
        if slot == "post" and sub.spec.module not in _ONE_STREAM:
            continue  # the other stream gets the branch without it
        if slot == "post":
            form.scale_rows(sub.writer, weight)
        for linear in {"pre": sub.readers, "inner": [sub.writer]}.get(slot, []):
            form.scale_columns(linear, weight)
        sub.put(slot, None)


def move_before_rotation(sub: Sublayer) -> None:
    """Let what acts on rotated queries and keys act before RoPE, where it treats pairs alike."""
    if sub.kind != "attn":
        return
    for slot in ("q", "k"):
        held, before = sub.get(f"{slot}_rotated"), sub.get(slot)
        if held is None or "weight" not in held.tensors:
            continue
        weight = held.tensors["weight"]
        first, second = weight.chunk(2)
        if sub.form.shape["position"] == "rope" and not torch.equal(first, second):
            continue
        if held.op == "gain":
            moved = _times(before, weight, sub=sub, slot=slot)
        elif is_norm(held) and held.op == "rmsnorm" and before is None:
            moved = norm("rmsnorm", eps_of(held), weight, held.tensors.get("bias"), per_head=True)
        else:
            continue
        if moved is not None:
            sub.put(slot, moved)
        sub.put(f"{slot}_rotated", None)


def _times(before: Held | None, weight: torch.Tensor, *, sub: Sublayer, slot: str) -> Held | None:
    """What stands before RoPE, multiplied by a gain over a head; without it, into the matrix."""
    if before is None:
        rows = sub.form.weight(sub.linear(slot)).shape[0]
        sub.form.scale_rows(sub.linear(slot), weight.repeat(rows // len(weight)))
        return None
    tensors = {k: v * weight.repeat(len(v) // len(weight)) for k, v in before.tensors.items()}
    return Held(before.spec, tensors)


def fold_stream_gains(form: Form) -> Form:
    """Let the stream be added to and nothing else, where its gains are single numbers.

    A stream that is C times another has the same norms but for C's sign and eps / C^2, so gains on
    the skip and on the sum become gains of the branches. Where a norm acts on the sum, the gain of
    the skip stays, as a number. A form whose stream has other gains is returned as it is.
    """
    rewritten = form.copy()
    try:
        _fold_stream_gains(rewritten)
    except _Stuck:
        return form
    return rewritten


class _Stuck(Exception):  # noqa: N818 (no error: the form stays as it was)
    """A gain of the stream is no single number, or something reads the stream's size."""


def _fold_stream_gains(form: Form) -> None:
    factor = block = 1.0  # what the true stream, and that before this block, is of the written one
    for sub in form.sublayers():
        spec = sub.spec
        if spec.module != "residual":
            raise _Stuck
        block = factor if sub.kind == "attn" else block
        if spec.entry is not None:
            sub.put("entry", _reading(sub.get("entry"), factor))
            factor = 1.0
        _read(sub, block if spec.reads == "block" else factor)
        carried = (block if spec.skips == "block" else factor) * _number(sub, "skip")
        if is_norm(sub.get("out")):
            sub.put("skip", gain(torch.full((form.hidden,), carried, dtype=torch.float64)))
            factor = 1.0
            continue
        factor = carried * _number(sub, "out")
        _write(sub, 1 / carried)
        sub.put("skip", None)
        sub.put("out", None)
    final = form.get_final()
    if final is not None:
        form.put_final(_reading(final, factor))
    elif factor != 1:
        form.untie("the stream's gain is in its matrix")
        form.scale_columns(HEAD, factor)


def _number(sub: Sublayer, slot: str) -> float:
    """The one number by which a slot multiplies."""
    held = sub.get(slot)
    if held is None:
        return 1.0
    weight = held.tensors.get("weight")
    if held.op != "gain" or weight is None or not bool((weight == weight[0]).all()):
        raise _Stuck
    if float(weight[0]) == 0:
        raise _Stuck
    return float(weight[0])


def _reading(held: Held | None, factor: float) -> Held:
    """The norm that makes of the written stream what `held` made of `factor` times it."""
    assert held is not None
    if factor == 1:
        return held
    if not is_norm(held):
        raise _Stuck
    sign = 1.0 if factor > 0 else -1.0
    return norm(
        held.op,
        eps_of(held) / factor**2,
        sign * held.tensors["weight"],
        held.tensors.get("bias"),
        per_head=held.spec.per_head,
    )


def _read(sub: Sublayer, factor: float) -> None:
    """Let a branch read the written stream."""
    if (pre := sub.get("pre")) is not None:
        sub.put("pre", _reading(pre, factor))
    elif factor != 1:
        for linear in sub.readers:
            sub.form.scale_columns(linear, factor)


def _write(sub: Sublayer, factor: float) -> None:
    """Multiply what a branch adds by a number."""
    if factor == 1:
        return
    post = sub.get("post")
    if post is None:
        sub.form.scale_rows(sub.writer, factor)
    elif is_norm(post):
        sub.put("post", Held(post.spec, {k: v * factor for k, v in post.tensors.items()}))
    else:
        raise _Stuck


def _gain(sub: Sublayer, slot: str) -> torch.Tensor | None:
    """The numbers of a slot that holds a gain."""
    if slot not in sub.spec.slots():
        return None
    held = sub.get(slot)
    return held.tensors["weight"] if held is not None and held.op == "gain" else None


def _width(sub: Sublayer, slot: str) -> int:
    """The features that a slot sees."""
    shape = sub.form.shape
    head_dim, heads = shape["head_dim"], shape["num_attention_heads"]
    if slot in ("q", "k", "v"):
        count = heads if slot == "q" else shape["num_key_value_heads"]
        spec = getattr(sub.spec, slot)
        return int(head_dim * (1 if spec.per_head else count))
    if slot in ("q_rotated", "k_rotated"):
        return int(head_dim)
    if slot in ("gate", "up") or (slot == "inner" and sub.kind == "mlp"):
        return int(shape["intermediate_size"])
    return int(heads * head_dim) if slot == "inner" else int(sub.form.hidden)
