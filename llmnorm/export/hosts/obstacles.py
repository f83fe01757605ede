"""What of a form a class cannot hold, in words: ends of sentences that begin with the class."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from llmnorm.export.canonical import is_norm
from llmnorm.export.form import Form, Held, Kind, Sublayer
from llmnorm.export.hosts.one_eps import embedding_norm

if TYPE_CHECKING:
    from llmnorm.export.hosts.base import Host

Place = tuple[Kind, str]
_WHERE = {"attn": "attention", "mlp": "the mlp"}
_PER_HEAD = {True: "per head", False: "over all features"}


def obstacles(host: "Host", form: Form) -> Iterator[str]:
    """What stands in the way of a host's holding a prepared form."""
    yield from _about_slots(host, form)
    yield from _about_norm(host, form.get_final(), "the final norm", wanted=host.final)
    yield from _about_embedding(host, form)
    if form.logits is not None:
        yield f"has no {form.logits.op} on the logits"
    if form.streams is not None:
        yield "has one residual stream, the model two"
    yield from _about_shape(host, form)


def _about_slots(host: "Host", form: Form) -> Iterator[str]:
    """What slots and joints hold, sublayers with the same problem told at once."""
    counts: Counter[tuple[str, Place]] = Counter()
    for sub in form.sublayers():
        counts.update((problem, (sub.kind, slot)) for problem, slot in _about_sublayer(host, sub))
    grouped: dict[tuple[str, int], list[Place]] = {}
    for (problem, place), count in counts.items():
        grouped.setdefault((problem, count), []).append(place)
    for (problem, count), places in grouped.items():
        layers = "" if count == len(form.layers) else f" (in {count} of {len(form.layers)} layers)"
        yield problem.format(_named(places)) + layers


def _about_sublayer(host: "Host", sub: Sublayer) -> Iterator[tuple[str, str]]:
    """Pairs of a problem, a place to be named in it, and its slot (none: the whole sublayer)."""
    wanted = [slot for kind, slot in host.norms if kind == sub.kind]
    spec, slots = sub.spec, sub.spec.slots()
    if spec.module != "residual":
        yield f"has no joint {spec.module} in {{}}", ""
    reads = "block" if host.parallel and sub.kind == "mlp" else "stream"
    if spec.reads != reads:
        whose = {"block": "what attention reads", "stream": "the stream after attention"}
        yield f"lets {{}} read {whose[reads]}, the model {whose[spec.reads]}", ""
    if spec.skips != "stream":
        yield "adds {} to the stream, the model to the block's input", ""
    for slot in slots:
        if slot not in wanted and (sub.kind, slot) not in host.gains:
            yield f"has no place for {slots[slot].op} in {{}}", slot
    for slot in wanted:
        held = sub.get(slot)
        if held is None:
            yield "needs a norm in {}, where the model has none", slot
        elif held.op != host.op or not is_norm(held):
            yield f"has {host.op} in {{}}, the model {held.op}", slot
        elif "bias" in held.tensors and not host.norm_bias:
            yield "has no bias in the norm in {}", slot
        elif slot in ("q", "k") and held.spec.per_head != host.qk_per_head:
            theirs, ours = _PER_HEAD[host.qk_per_head], _PER_HEAD[held.spec.per_head]
            yield f"normalizes {theirs} in {{}}, the model {ours}", slot


def _about_norm(
    host: "Host", held: Held | None, place: str, *, wanted: bool = True
) -> Iterator[str]:
    if held is None:
        if wanted:
            yield f"needs {place.replace('the', 'a', 1)}, which the model lacks"
    elif not wanted:
        yield f"has no {place.removeprefix('the ')}, the model has {held.op}"
    elif held.op != host.op or not is_norm(held):
        yield f"has {host.op} as {place}, the model {held.op}"
    elif "bias" in held.tensors and not host.norm_bias:
        yield f"has no bias in {place}, and no head can take it"


def _about_embedding(host: "Host", form: Form) -> Iterator[str]:
    treatment = form.embedding.treatment
    if host.embedding == "norm":
        yield from _about_norm(host, embedding_norm(form), "the norm of the embedding")
    elif treatment not in ("raw", host.embedding):
        yield f"does nothing to the sum of tokens and positions, the model has a {treatment} there"


def _about_shape(host: "Host", form: Form) -> Iterator[str]:
    shape = form.shape
    if shape["mlp"] != host.mlp:
        yield f"has a {host.mlp} mlp, the model a {shape['mlp']} one"
    if shape["position"] != host.position:
        yield f"has position {host.position!r}, the model {shape['position']!r}"
    if linears := host.unheld_biases(form):
        yield f"has no biases in {_listed([f'{name}_proj' for name in linears])}"
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    if not host.has("head_dim") and shape["head_dim"] * heads != hidden:
        theirs = f"hidden_size / num_attention_heads = {hidden / heads:g}"
        yield f"has heads of {theirs} features, the model of {shape['head_dim']}"
    elif hidden % heads and _wants_whole_heads(host, hidden, heads):
        yield f"wants a hidden_size that its {heads} heads divide, the model has {hidden}"


def _wants_whole_heads(host: "Host", hidden: int, heads: int) -> bool:
    """Whether the class's config refuses such a width, though it could say `head_dim`."""
    try:
        host.config_class(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads)
    except StrictDataclassError:
        return True
    return False


def _named(places: list[Place]) -> str:
    """`slots q and k of attention and slot post of the mlp`."""
    by_slots: dict[tuple[str, ...], list[Kind]] = {}
    for kind in dict.fromkeys(kind for kind, _ in places):
        slots = tuple(slot for one, slot in places if one == kind and slot)
        by_slots.setdefault(slots, []).append(kind)
    return " and ".join(_phrase(slots, kinds) for slots, kinds in by_slots.items())


def _phrase(slots: tuple[str, ...], kinds: Iterable[Kind]) -> str:
    where = [_WHERE[kind] for kind in kinds]
    if not slots:
        return _listed(where)
    word = "slot" if len(slots) == 1 else "slots"
    return f"{word} {_listed(list(slots))} of {_listed(where)}"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
