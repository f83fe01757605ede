"""The comparison of a whole stack with what its reference recorded."""

import torch
from torch import Tensor

from .cases import Case, assert_equal, matching
from .stack import Outcome, Stack, reference_of, run


def compare_stack(case: Case, stack: Stack) -> None:
    """Raise AssertionError on the first recorded number that our model does not reproduce.

    Outputs and losses in every recorded precision; hidden states and gradients in float64.
    """
    data = case.manifest.tensors()
    reference = reference_of(case)
    inputs = _inputs(case, data)
    outcome = run(stack, stack.model(case.dtype), reference, inputs)
    tolerances = case.manifest.content["tolerance"]
    kind = stack.output
    recorded = f"{case.prefix}{kind}.{case.variant}"
    # Families store outputs in float64 alone; other precisions are held to them.
    output = data.get(recorded, data[f"{case.prefix}{kind}.f64"])
    assert_equal(kind, outcome.output, output, tolerances[case.variant])
    loss = data[f"{case.prefix}loss.{case.variant}"]
    assert_equal("loss", outcome.loss[None], loss, tolerances[case.variant])
    if case.variant == "f64":
        for stream, states in (("hidden", outcome.hidden), ("hidden_y", outcome.hidden_y)):
            for name, number in matching(set(data), f"{case.prefix}{stream}.", ".f64"):
                after = int(number) * stack.blocks_per_layer
                assert_equal(name, states[after], data[name], tolerances["f64"])
        compare_gradients(case, outcome, reference, inputs, tolerances["grad"])


def _inputs(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" in data:
        return {"input_ids": data["input_ids"]}
    x = data["x"].to(case.dtype).requires_grad_()
    return {"x": x, "dy": data["dy"].to(case.dtype)}


def compare_gradients(
    case: Case,
    outcome: Outcome,
    reference: dict[str, Tensor],
    inputs: dict[str, Tensor],
    tolerance: dict[str, float],
) -> None:
    """Compare the recorded gradients, and the gradient norm of every parameter."""
    leaves = {**reference, **({"x": inputs["x"]} if "x" in inputs else {})}
    grads = torch.autograd.grad(outcome.loss, list(leaves.values()), allow_unused=True)
    ours = dict(zip(leaves, grads, strict=True))
    data = case.manifest.tensors()
    recorded = case.fields["grad_l2_norms_f64"]
    unread = [name for name, grad in ours.items() if grad is None and recorded.get(name)]
    assert not unread, f"our model reads no {', '.join(unread)}; the reference does"
    for name, parameter in matching(set(data), f"{case.prefix}grad."):
        assert_equal(name, ours[parameter], data[name], tolerance)
    if f"{case.prefix}dx.f64" in data:
        assert_equal("dx", ours["x"], data[f"{case.prefix}dx.f64"], tolerance)
    for parameter, norm in recorded.items():
        grad = ours[parameter]
        if norm is None:
            assert grad is None or not grad.any(), f"{parameter} has a gradient only here"
            continue
        found = torch.zeros((), dtype=case.dtype) if grad is None else grad.norm()
        wanted = torch.tensor(norm, dtype=case.dtype)
        assert_equal(f"gradient norm of {parameter}", found, wanted, tolerance)
