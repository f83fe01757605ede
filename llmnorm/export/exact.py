"""Conversions that change no output: LayerNorm to RMSNorm, that to CRMSNorm, and folded removals.

A LayerNorm is an RMSNorm of what has zero mean. In a Pre-LN model whatever writes to the stream can
be made to write zero means, so its LayerNorms subtract nothing and become RMSNorms. A stream of
zero mean needs no last feature, which is what CRMSNorm leaves out. Both hold for the model as it
is: a step of training gives the stream a mean again, which the RMSNorms keep and the LayerNorms
would have subtracted.

Source: Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", 2023, arXiv:2305.14858.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from llmnorm.build import build_config
from llmnorm.errors import ConfigError, ParityError
from llmnorm.evaluation.loading import load
from llmnorm.export.canonical import eps_of, is_norm, norm
from llmnorm.export.certificate import certify
from llmnorm.export.command import ours, saved_dtype
from llmnorm.export.conversion.removal import fold_removed
from llmnorm.export.folds import centre_stream, fold_biases, fold_gains, tables
from llmnorm.export.form import HEAD, Form, Held, Sublayer
from llmnorm.export.importing import describe, sample
from llmnorm.export.making import making, write_model
from llmnorm.export.simplify import simplify
from llmnorm.export.writing import DTYPES
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.residual import NormSpec, ResidualSpec

EXACT = 1e-9
"""The largest difference of logits in float64, in standard deviations of theirs."""
_OURS = True  # the code in the folder
_CENTRED = 1e-6  # of a row's size: the mean that rounding to float32 leaves


def layernorm_to_rmsnorm(form: Form) -> Form:
    """The same function with rmsnorms before its sublayers and before the head.

    Biases of the norms become biases of the linear layers after them; but all stay where they are
    if the final norm has one, as no head takes it.

    Raises:
        ConfigError: if the form is not Pre-LN with layernorms; it says what stands in the way.
    """
    form = simplify(form)
    _check_pre_ln(form, "layernorm")
    centre_stream(form)
    final = form.get_final()
    if final is None or "bias" not in final.tensors:
        fold_biases(form)
        return form
    for sub in form.sublayers():
        sub.put("pre", _with_bias(sub.get("pre")))
    form.notes.append("the final norm has a bias, which no head takes, so all rmsnorms keep theirs")
    return form


def rmsnorm_to_crmsnorm(form: Form) -> Form:
    """The same function with crmsnorms and a stream that is one feature narrower.

    Gains and biases of the norms become part of the linear layers after them, of an untied head
    too. Layernorms are made rmsnorms first.

    Raises:
        ConfigError: if the form is not Pre-LN, its stream has a mean, or its final norm a bias.
    """
    form = simplify(form)
    final = form.get_final()
    if final is not None and final.op == "layernorm":
        form = layernorm_to_rmsnorm(form)
    _check_pre_ln(form, "rmsnorm")
    _check_centred(form)
    final = form.get_final()
    if final is not None and "bias" in final.tensors:
        raise ConfigError(
            "the final norm has a bias, which no head can take and crmsnorm has none;"
            " train with norm {op: layernorm, bias: false}"
        )
    fold_biases(form)
    fold_gains(form)
    _narrow(form)
    return form


EXACT_CONVERSIONS: dict[str, Callable[[Form], Form]] = {
    "rmsnorm": layernorm_to_rmsnorm,
    "crmsnorm": rmsnorm_to_crmsnorm,
    "none": fold_removed,
}


def convert(args: argparse.Namespace) -> int:
    """Convert the model that `llmnorm convert` was given, and prove it.

    Raises:
        ConfigError: for a model that cannot be converted.
        ParityError: if the result computes something else; nothing is written.
    """
    source = load(args.source, dtype="fp64")
    original = ours(source)
    saved_in = DTYPES.get(args.dtype) or saved_dtype(args.source, trust_remote_code=False)
    form = EXACT_CONVERSIONS[args.to](Form.of(original))
    model = form.to_model(named(form))
    ids, where = sample(source, model.config)
    with making(args.out) as folder:
        write_model(folder, model, source, saved_in)
        parity = certify(
            folder,
            original,
            None,
            saved_in,
            ids,
            trust_remote_code=_OURS,
            text_source=where,
            form=form,
        )
        far = parity["errors"].get("fold", {}).get("rel", math.inf)
        if not (parity["passed"] and far <= EXACT):
            raise ParityError(
                f"{args.source}: the converted model computes something else, so nothing is"
                f" written: {'; '.join(parity['failures']) or f'logits differ by {far:.1e}'}"
            )
    lines = [
        f"{describe(original.config)} is now {describe(model.config)}",
        *form.notes,
        f"converted in float64, the logits differ by {far:.1e} of their standard deviation",
        *parity["summary"],
        f"wrote {args.out}",
    ]
    if args.to != "none":
        lines.append("equal as it is; trained on, the two differ, as the stream gets a mean again")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def named(form: Form) -> LlmNormConfig | None:
    """The config of a form as pre_ln with its norm, if that is what it is; else None."""
    final = form.get_final()
    if final is None:
        return None
    own = inspect.get_annotations(LlmNormConfig)
    shape = {name: value for name, value in form.shape.items() if name in own}
    config = build_config(
        shape,
        norm=final.spec.to_dict(),
        placement="pre_ln",
        qk_norm=_qk_norm(form),
        attention_bias=form.has_bias("attn"),
        mlp_bias=form.has_bias("mlp"),
    )
    subs = [_in_full(sub) for sub in form.sublayers()]
    wiring = list(zip(subs[::2], subs[1::2], strict=True))
    return config if config.residual_specs() == wiring else None


def _in_full(sub: Sublayer) -> ResidualSpec:
    """Its wiring with every option written out, as a config has it."""
    slots = sub.spec.slots().items()
    return sub.spec.having(**{slot: held.at(sub.kind, sub.form.hidden) for slot, held in slots})


def _check_pre_ln(form: Form, op: str) -> None:
    """Raise ConfigError unless every sublayer adds its branch, which reads a norm `op`."""
    if form.streams is not None:
        raise ConfigError("the model has two residual streams; this conversion is for Pre-LN")
    for sub in form.sublayers():
        joint = {"entry", "post", "skip", "out"} & set(sub.spec.slots())
        if sub.spec.module != "residual" or joint:
            what = f"slot {min(joint)}" if joint else f"joint {sub.spec.module}"
            raise ConfigError(
                f"{sub.name} does not simply add its branch to the stream ({what});"
                " this conversion is for Pre-LN, whose norms alone read the stream"
            )
        _check_norm(sub.get("pre"), op, f"before {sub.name}")
    _check_norm(form.get_final(), op, "before the head")


def _check_norm(held: Held | None, op: str, where: str) -> None:
    if held is not None and held.op == op and is_norm(held):
        return
    seen = "nothing" if held is None else held.op
    raise ConfigError(f"{where} stands {seen}; this conversion begins with {op}")


def _check_centred(form: Form) -> None:
    """Raise ConfigError unless whatever writes to the stream writes zero means."""
    written = {name: form.tensors[name].T for name in tables(form)}
    for sub in form.sublayers():
        written[f"{sub.writer}.weight"] = form.weight(sub.writer)
        if (bias := form.bias(sub.writer)) is not None:
            written[f"{sub.writer}.bias"] = bias
    for name, matrix in written.items():  # (hidden, ...)
        size = float(matrix.square().mean().sqrt())
        mean = float(matrix.mean(0).abs().max())
        if mean > _CENTRED * size:
            raise ConfigError(
                f"the stream has a mean ({name} writes up to {mean / size:.1e} of its size), which"
                " crmsnorm cannot hold; only a model of layernorms can be given a stream without"
            )


def _narrow(form: Form) -> None:
    """Leave out the last feature of a centred stream, minus the sum of the others."""
    tensors = form.tensors
    for name in tables(form):
        tensors[name] = tensors[name][:, :-1]
    for sub in form.sublayers():
        for linear in sub.readers:
            tensors[f"{linear}.weight"] = _without_last(form.weight(linear))
        for part in ("weight", "bias"):
            if (tensor := tensors.get(f"{sub.writer}.{part}")) is not None:
                tensors[f"{sub.writer}.{part}"] = tensor[:-1]
        sub.put("pre", _crmsnorm(sub.get("pre")))
    tensors[f"{HEAD}.weight"] = _without_last(form.weight(HEAD))
    form.put_final(_crmsnorm(form.get_final()))
    form.shape["hidden_size"] -= 1


def _without_last(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[:, :-1] - matrix[:, -1:]


def _crmsnorm(held: Held | None) -> Held:
    assert held is not None
    return Held(NormSpec(op="crmsnorm", options={"eps": eps_of(held)}))


def _with_bias(held: Held | None) -> Held:
    assert held is not None
    weight = held.tensors["weight"]
    return norm(held.op, eps_of(held), weight, held.tensors.get("bias", torch.zeros_like(weight)))


def _qk_norm(form: Form) -> dict[str, Any] | str:
    """The config field that fills the slots of queries, keys and values as the first layer does."""
    slots = Sublayer(form, 0, "attn").spec.slots()
    turned = "_rotated" if "q_rotated" in slots else ""
    spec = slots.get(f"q{turned}")
    if spec is None:
        return "none"
    layout = "per_head" if spec.per_head or turned else "full_width"
    found = {"layout": layout, "op": spec.op, **spec.options}
    return {
        **found,
        **({"rope": "after"} if turned else {}),
        **({"value": True} if "v" in slots else {}),
    }
