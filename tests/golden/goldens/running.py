"""Norms by running statistics: step after step of training, then evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmnorm.running_norms import PowerNorm, UnifiedNorm

from .cases import Case, NotImplementedCaseError, Switches, assert_equal, matching


@dataclass(frozen=True, kw_only=True)
class Running:
    """Our norm for a case, and the reference's names of its buffers."""

    norm: torch.nn.Module
    buffers: dict[str, str]
    time_first: bool


def compare_running(case: Case) -> None:
    """Raise AssertionError on the first recorded number of the case that we do not reproduce."""
    op = case.manifest.content.get("op")
    if op not in _RUNNING:
        raise NotImplementedCaseError(f"norm {op}")
    switches = Switches(case.fields["hyper"])
    running = _RUNNING[op](switches, case.fields["shape"][-1])
    switches.done()
    data, norm = case.manifest.tensors(), running.norm.to(case.dtype)
    with torch.no_grad():
        for name in ("weight", "bias"):
            norm.get_parameter(name).copy_(data[f"{case.name}/param.{name}"])
        for name, theirs in running.buffers.items():
            start = data[f"{case.name}/state0.{theirs}"]
            norm.get_buffer(name).copy_(start.view_as(norm.get_buffer(name)))
    for step in range(case.fields["steps"]):
        _compare(case, running, data, f"step{step}")
    norm.eval()
    _compare(case, running, data, "eval")


def _compare(case: Case, running: Running, data: dict[str, Tensor], part: str) -> None:
    """Forward, backward and the buffers after both."""
    norm, prefix = running.norm, f"{case.name}/{part}"
    x = data[f"{prefix}.x"].to(case.dtype).requires_grad_()
    mask = data.get(f"{prefix}.pad_mask")
    if mask is not None:
        mask = mask.bool().T if running.time_first else mask.bool()
    y = norm(x, mask)
    dy = data[f"{prefix}.dy"].to(case.dtype)
    found = torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)
    names = ("dx", "grad.weight", "grad.bias")
    for name, value in {"y": y, **dict(zip(names, found, strict=True))}.items():
        recorded = data[f"{prefix}.{name}.{case.variant}"]
        assert_equal(f"{part}.{name}", value, recorded, case.fields["tolerance"])
    ours = {theirs: norm.get_buffer(name) for name, theirs in running.buffers.items()}
    for full, name in matching(set(data), f"{prefix}.state."):
        name, _, variant = name.partition(".")
        if variant in ("", case.variant):
            value = ours[name].to(case.dtype).flatten()
            assert_equal(full, value, data[full].flatten(), case.fields["tolerance"])


def _powernorm(switches: Switches, dim: int) -> Running:
    switches.expect("group_scaling_eps", 1e-5)
    switches.expect("layout", "T x B x C, pad_mask B x T (True = padding)")
    norm = PowerNorm(
        dim,
        eps=switches.take("eps"),
        groups=switches.take("group_num"),
        warmup_steps=switches.take("warmup_iters"),
        forward_momentum=switches.take("alpha_fwd"),
        backward_momentum=switches.take("alpha_bkw"),
    )
    names = {"running_square": "running_phi", "gradient_sum": "ema_gz", "steps": "iters"}
    return Running(norm=norm, buffers=names, time_first=True)


def _unifiednorm(switches: Switches, dim: int) -> Running:
    switches.expect("layout", "B x N x C, pad_mask B x N (True = padding)")
    window = switches.take("window_size")
    forward, backward = window if isinstance(window, list) else (window, window)
    norm = UnifiedNorm(
        dim,
        eps=switches.take("eps"),
        momentum=switches.take("momentum"),
        window=forward,
        backward_window=backward,
        warmup_steps=switches.take("warmup_iters"),
        filtering=switches.take("outlier_filtration"),
    )
    names = {
        "running_square": "running_var",
        "running_gradient": "ema_gz",
        "squares": "buffer_x2",
        "gradients": "buffer_gz",
        "steps": "iters",
        "skipped": "skip_counter",
    }
    return Running(norm=norm, buffers=names, time_first=False)


_RUNNING: dict[str, Callable[[Switches, int], Running]] = {
    "PowerNorm": _powernorm,
    "UnifiedNorm": _unifiednorm,
}
