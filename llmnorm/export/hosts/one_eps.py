"""Classes have one eps for all their norms; a form may have several."""

from collections import Counter

from llmnorm.export.canonical import eps_of, is_norm
from llmnorm.export.form import Form, Held
from llmnorm.modeling.residual import NormSpec


def eps(form: Form) -> float:
    """The one eps that stands for those of all norms: the commonest, the greater of equals.

    What that changes is measured with every export (`certificate.py`).
    """
    counts = Counter(eps_of(held) for held in _norms(form))
    return max(counts, key=lambda value: (counts[value], value)) if counts else 1e-6


def with_one_eps(form: Form) -> Form:
    """A copy whose norms all have `eps(form)`, as the class will have it."""
    form, one = form.copy(), eps(form)
    for sub in form.sublayers():
        for slot in sub.spec.slots():
            held = sub.get(slot)
            if held is not None and is_norm(held):
                sub.put(slot, Held(held.spec.having(eps=one), held.tensors))
    final = form.get_final()
    if final is not None and is_norm(final):
        form.put_final(Held(final.spec.having(eps=one), final.tensors))
    if is_norm(held := embedding_norm(form)) and held is not None:
        form.shape["embedding"]["norm"]["eps"] = one
    return form


def embedding_norm(form: Form) -> Held | None:
    """The norm of the embedding, where it is not in the table."""
    spec: NormSpec | None = form.embedding.norm
    return None if spec is None else Held(spec, form.parts("model.embedding_norm"))


def _norms(form: Form) -> list[Held]:
    held = [sub.get(slot) for sub in form.sublayers() for slot in sub.spec.slots()]
    held += [form.get_final(), embedding_norm(form)]
    return [one for one in held if one is not None and is_norm(one)]
