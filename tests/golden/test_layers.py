"""Norms and attention modules give the references' outputs and gradients."""

import pytest
import torch
from goldens.cases import Case, assert_equal, layer_cases, matching
from goldens.layers import build_attention, build_norm, is_attention
from goldens.running import compare_running
from torch import Tensor
from torch.func import functional_call

golden_cases = layer_cases
pytestmark = pytest.mark.fast


def test_layer_equals_the_reference(case: Case) -> None:
    if case.manifest.kind == "stateful_layer":
        compare_running(case)
    elif is_attention(case):
        compare_attention(case)
    else:
        compare_norm(case)


def leaves(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's parameters in the case's precision, as leaves of the graph."""
    stored = f".{case.variant}" if case.variant == "bf16" else ""
    found = {}
    for name, parameter in matching(set(data), f"{case.name}/param.", stored):
        unused = parameter in case.fields.get("unused_params", ())
        if not unused and (stored or not name.endswith(".bf16")):
            found[parameter] = data[name].to(case.dtype).requires_grad_()
    return found


def tensor(case: Case, data: dict[str, Tensor], name: str) -> Tensor:
    """An input in the case's precision; bfloat16 inputs are stored as such."""
    stored = data[f"{name}.bf16" if case.variant == "bf16" else name]
    return stored.to(case.dtype, copy=True)


def compare_norm(case: Case) -> None:
    module, to_ours = build_norm(case)
    data = case.manifest.tensors()
    params = leaves(case, data)
    shared = case.fields.get("input", case.name)
    x = tensor(case, data, f"{shared}/x").requires_grad_()
    y = functional_call(module, to_ours(params), (x,), strict=True)
    compare_gradients(case, data, y, x, params, tensor(case, data, f"{shared}/dy"))


def compare_attention(case: Case) -> None:
    attention = build_attention(case)
    data = case.manifest.tensors()
    params = leaves(case, data)
    x = tensor(case, data, f"{case.name}/x").requires_grad_()
    y = attention(params, x)
    ours = {**attention.seen, **dict(zip(("cos", "sin"), attention.table(x), strict=True))}
    for name, value in ours.items():
        if f"{case.name}/{name}.{case.variant}" in data:
            reference = data[f"{case.name}/{name}.{case.variant}"]
            if reference.ndim == 4 and reference.shape != value.shape:  # heads before positions
                reference = reference.transpose(1, 2)
            assert_equal(name, value, reference, case.fields["tolerance"])
    compare_gradients(case, data, y, x, params, tensor(case, data, f"{case.name}/dy"))


def compare_gradients(
    case: Case,
    data: dict[str, Tensor],
    y: Tensor,
    x: Tensor,
    params: dict[str, Tensor],
    dy: Tensor,
) -> None:
    """Compare y, dx and every recorded parameter gradient."""
    assert y.dtype == case.dtype
    tolerance, suffix = case.fields["tolerance"], f".{case.variant}"
    dx, *grads = torch.autograd.grad(y, [x, *params.values()], dy)
    ours = dict(zip(params, grads, strict=True))
    assert_equal("y", y, data[f"{case.name}/y{suffix}"], tolerance)
    assert_equal("dx", dx, data[f"{case.name}/dx{suffix}"], tolerance)
    for name, parameter in matching(set(data), f"{case.name}/grad.", suffix):
        assert_equal(name, ours[parameter], data[name], tolerance)
