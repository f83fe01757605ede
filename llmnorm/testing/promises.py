"""The check that self_test accepts a scheme, trained too, and names each defect planted in it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from llmnorm.errors import SelfTestError
from llmnorm.modeling.residual import RESIDUALS, Residual
from llmnorm.selftest import promised_slots, self_test
from llmnorm.testing.scheme import Scheme, expect

# Matrices of 64 x 32 elements and more: 30 % is four times the tolerance of their std.
_WIDE = {"hidden_size": 64, "intermediate_size": 192}


def check_promises(scheme: Scheme) -> str:
    """Fresh models keep their promises, std of every matrix included; a defect is named."""
    for seed in (0, 2):
        scheme.model(seed=seed, mlp_bias=True)  # self_test has run
    model = scheme.model(**_WIDE)
    defects = list(_defects(model))
    for what, planted in defects:
        with planted:
            _expect_broken(model, what)
    self_test(model, fresh=True)
    with torch.no_grad():
        for parameter in model.parameters():  # a matrix keeps its length, which may be promised
            parameter.mul_(-1) if parameter.ndim > 1 else parameter.mul_(1.5).add_(0.01)
    self_test(model, fresh=False)
    return f"{len(defects)} planted defects named"


def _expect_broken(model: nn.Module, what: str) -> None:
    try:
        self_test(model, fresh=True)
    except SelfTestError:
        return
    expect(False, f"self_test passing {what}", "a SelfTestError")


def _defects(model: Any) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Each kind of defect once: a lost module, another number, another joint, another std."""
    seen = set()
    for name, spec, _ in promised_slots(model.config):
        if spec is None or (slot := (name.rpartition(".")[2], spec.op)) in seen:
            continue
        seen.add(slot)
        yield f"{name} without its {spec.op}", _replaced(model, name)
        for key in ("scale", "value"):
            if isinstance(getattr(model.get_submodule(name), key, None), float):
                yield f"another {name}.{key}", _changed(model.get_submodule(name), key)
    for name, joint in model.model.layers[-1].named_modules():
        if isinstance(joint, Residual):
            other = RESIDUALS["lerp" if type(joint) is Residual else "residual"]
            yield f"{name} as {other.__name__}", _changed(joint, "__class__", other)
            yield f"{name} reading elsewhere", _changed(joint, "reads", 1 - joint.reads)
            yield f"{name} skipping elsewhere", _changed(joint, "skips", 1 - joint.skips)
    if model.config.streams_spec() is not None:
        yield "streams opened at another scale", _changed(model.model.streams, "scale")
    if type(model.model.embedding_scale) is not nn.Identity:
        yield "a lost scale of the embedding", _replaced(model, "model.embedding_scale")
    for name, matrix in model.model.layers[-1].named_modules():
        if isinstance(matrix, nn.Linear):
            yield f"{name} drawn too wide", _widened(matrix.weight)


@contextmanager
def _replaced(model: nn.Module, name: str) -> Iterator[None]:
    kept = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    yield
    model.set_submodule(name, kept)


@contextmanager
def _changed(module: Any, attribute: str, value: Any = None) -> Iterator[None]:
    """Give an attribute another value, by default another number."""
    kept = getattr(module, attribute)
    setattr(module, attribute, 1.5 * kept + 0.25 if value is None else value)
    yield
    setattr(module, attribute, kept)


@contextmanager
def _widened(weight: torch.Tensor) -> Iterator[None]:
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.3).add_(0.01 * torch.randn(weight.shape, generator=torch.Generator()))
    yield
    with torch.no_grad():
        weight.copy_(kept)
