"""The folder of a model that no class of transformers holds: it brings its own code.

What serves such a folder may be vLLM's transformers backend, which rewrites the model that it
loads. What it asks for, and where it is met: `auto_map` names AutoModel too (`making.py`);
everything between embedding and head is in the base model, so nothing acts on the logits (here);
attention goes through transformers' table of attention functions in a module that has `config`,
`layer_idx` and `scaling`, and gets all keyword arguments (`attention.py`); plans for tensor and
pipeline parallelism, one list of layers, the usual names of projections
(`configuration_llmnorm.py`).

It also replaces every module whose computation looks like RMSNorm by its own, which knows `weight`
and `eps` and nothing else. So every norm is written plainly here: its constants are in its weight.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmnorm.evaluation.loading import Loaded
from llmnorm.export.canonical import canonical
from llmnorm.export.folds import fold_pointwise
from llmnorm.export.form import HEAD, Form, Held, Tensors
from llmnorm.export.making import write_with_code
from llmnorm.export.simplify import simplify
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

_WITH_NORMS = ("residuals", "final_norm", "streams", "embedding")
_ASKED = ("norm", "placement", "qk_norm")


def serving_form(form: Form, *, pointwise: bool = False) -> Form:
    """A copy of a form, rewritten so that no constant stands where a server would not look.

    As `simplify`; also what that leaves as it is, the norm of an embedding with learned positions
    and the norms of a second stream, is written plainly.

    Args:
        form: any form.
        pointwise: fold gain and bias of point-wise norms into the next linear layers.
    """
    form = simplify(form)
    _write_embedding_plainly(form)
    _write_streams_plainly(form)
    if pointwise:
        fold_pointwise(form)
    return form


def write_custom(
    folder: Path, form: Form, source: Loaded, dtype: torch.dtype, shard_size: str
) -> None:
    """Write a serving form with the code that runs it; arguments and errors as `write_folder`."""
    config = _config(form)
    asked = source.model.config
    config.trained_as = {name: getattr(asked, name) for name in _ASKED}  # for people
    with torch.device("meta"):
        model = LlmNormForCausalLM(config)
    write_with_code(folder, model, _tensors(form, model), source, dtype, shard_size)


def _tensors(form: Form, model: LlmNormForCausalLM) -> Tensors:
    """The tensors of a form by the names of its model, without the second name of a tied head."""
    wanted = model.state_dict()
    if form.tied:
        del wanted[f"{HEAD}.weight"]
    zeros = {
        name: torch.zeros(tensor.shape, dtype=torch.float64)
        for name, tensor in wanted.items()
        if name not in form.tensors
    }
    assert all(name.endswith(".bias") for name in zeros), sorted(zeros)
    return {name: zeros[name] if name in zeros else form.tensors[name] for name in wanted}


def _write_embedding_plainly(form: Form) -> None:
    """Write the norm of an embedding that is not in its table."""
    spec, name = form.embedding.norm, "model.embedding_norm"
    if spec is None:
        return
    held = canonical(Held(spec, form.parts(name)), form.hidden)
    form.drop(name)
    if held is None:
        form.shape["embedding"] = "raw"
        return
    form.shape["embedding"] = {"treatment": "norm", "norm": held.spec.to_dict()}
    _store(form, name, held)


def _write_streams_plainly(form: Form) -> None:
    """Write the norms that close two streams."""
    if form.streams is None:
        return
    for end in ("first", "second"):
        spec, name = getattr(form.streams, end), f"model.streams.{end}"
        if spec is None:
            continue
        held = canonical(Held(spec, form.parts(name)), form.hidden)
        form.drop(name)
        changed: Any = {end: None if held is None else held.spec}
        form.streams = replace(form.streams, **changed)
        if held is not None:
            _store(form, name, held)


def _config(form: Form) -> LlmNormConfig:
    """The config of a serving form; if one RMSNorm has a bias, all have, with zeros.

    Servers judge a class by one of its modules, and an RMSNorm with a bias is none of theirs.
    """
    config = form.to_config()
    fields = {name: getattr(config, name) for name in _WITH_NORMS}
    if _has(fields, "rmsnorm", bias=True):
        for name, value in fields.items():
            setattr(config, name, _with_bias(value, "rmsnorm"))
    return config


def _has(value: Any, op: str, **options: Any) -> bool:
    """Whether an operation with these options is anywhere in a config's fields."""
    if isinstance(value, list):
        return any(_has(item, op, **options) for item in value)
    if not isinstance(value, dict):
        return False
    if value.get("op") == op and options.items() <= value.items():
        return True
    return any(_has(item, op, **options) for item in value.values())


def _with_bias(value: Any, op: str) -> Any:
    if isinstance(value, list):
        return [_with_bias(item, op) for item in value]
    if not isinstance(value, dict):
        return value
    inside = {key: _with_bias(item, op) for key, item in value.items()}
    return {**inside, "bias": True} if value.get("op") == op else inside


def _store(form: Form, name: str, held: Held) -> None:
    for part, tensor in held.tensors.items():
        form.tensors[f"{name}.{part}"] = tensor
