"""N: rounding apart, how a step is computed changes nothing; norms are as exact as can be."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reliability.engines import Group, finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import words
from torch import Tensor, nn
from torch.nn import functional
from training.conftest import metrics

from llmnorm.config import load_run_config
from llmnorm.modeling.operations import list_norms, operation
from llmnorm.training import assembly
from llmnorm.training.loop import train
from llmnorm.training.pieces import PieceReader

Split = tuple[str, int, int]  # engine, processes, rows of a micro-batch
NATIVE: list[Split] = [("plain", 1, 1), ("plain", 1, 2), ("plain", 2, 2), ("fsdp2", 2, 2)]
ZERO: list[Split] = [(f"zero{stage}", 2, 2) for stage in (1, 2, 3)]


def ragged(output: Path, **changes: Any) -> list[str]:
    """5 rows with masked documents: no rank and no micro-batch has as many targets as another."""
    fixed = {"training__global_batch_size": 5, "data__document_mask": True, "optimizer__lr": 3e-3}
    return words(output, **{**fixed, "training__max_steps": 20, **changes})


def descent(output: Path, **changes: Any) -> list[str]:
    """One step of plain gradient descent, so long that the weights after it are the gradient."""
    fixed = {
        "optimizer__name": "torch.optim:SGD",
        "optimizer__lr": 1e6,
        "optimizer__weight_decay": 0.0,
        "schedule__name": "constant",
        "schedule__warmup_steps": 0,
        "training__clip_norm": 0.0,
        "training__max_steps": 1,
        "eval__interval_steps": 0,
    }
    return ragged(output, **{**fixed, **changes})


def run_in_float64(split: Split, words: list[str], logs: Path) -> None:
    """Train with a model whose weights are float64, to the end."""
    engine, world, _ = split

    def work() -> int:
        real = assembly.make_model
        assembly.make_model = lambda *args, **kwargs: real(*args, **kwargs).double()
        return train(load_run_config(None, words))

    group = Group(engine, world, words, logs, work)
    try:
        assert group.wait(100) == [0] * world, group.tail()
    finally:
        group.end()


def straight(folder: Path) -> Path:
    """The references: one process and the whole batch at once."""
    import_engines()
    whole = ("plain", 1, 5)
    run_in_float64(whole, ragged(folder / "losses"), folder / "logs")
    run_in_float64(whole, descent(folder / "gradient64"), folder / "logs")
    finished("plain", 1, descent(folder / "gradient32"), folder / "logs")
    return folder


def weights(run: Path, step: int) -> torch.Tensor:
    """All weights of a checkpoint as one vector."""
    reader = PieceReader(run / "checkpoints" / f"step_{step:08d}", "model")
    parts = []
    for name in sorted(reader.names()):
        size = sum(piece.numel for piece in reader._pieces(name))
        parts.append(reader.flat(name, 0, size).double())
    return torch.cat(parts)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance from `one`, relative to its length."""
    return ((other - one).norm() / one.norm()).item()


@bar("N5", "losses in float64: splits and engines to 1e-12", total=4, ci=2, prepare=straight)
def float64_losses(trial: Trial) -> None:
    split = NATIVE[trial.index]
    trial.note("{}-{} rows {}".format(*split))
    run = trial.folder / "run"
    run_in_float64(split, ragged(run, training__micro_batch_size=split[2]), trial.folder / "logs")
    reference = metrics(trial.shared / "losses")
    assert len(reference) == 20
    for one, other in zip(reference, metrics(run), strict=True):
        for key in ("train/loss", "grad_norm"):
            assert abs(other[key] - one[key]) <= 1e-12 * one[key], (key, one, other)


@bar("N7", "gradients of unequal ranks are those of one process", total=11, ci=4, prepare=straight)
def gradients(trial: Trial) -> None:
    exact = trial.index < len(NATIVE)
    split = [*NATIVE, *NATIVE, *ZERO][trial.index]
    trial.note("{}-{} rows {}".format(*split) + (" float64" if exact else ""))
    run = trial.folder / "run"
    command = descent(run, training__micro_batch_size=split[2])
    if exact:
        run_in_float64(split, command, trial.folder / "logs")
    else:
        finished(split[0], split[1], command, trial.folder / "logs")
    reference = trial.shared / ("gradient64" if exact else "gradient32")
    assert metrics(run)[0]["tokens"] == metrics(reference)[0]["tokens"]
    assert far(weights(reference, 1), weights(run, 1)) <= (1e-12 if exact else 1e-6)


WIDTHS = (1, 2, 3, 5, 7, 8, 31, 64, 127, 255, 256, 513, 1000, 1023, 2048, 4097, 8192)
EAGER: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "rmsnorm": lambda m, x: functional.rms_norm(x, m.weight.shape, m.weight, m.eps),
    "simple_rmsnorm": lambda m, x: functional.rms_norm(x, x.shape[-1:], None, m.eps),
    "layernorm": lambda m, x: functional.layer_norm(x, m.weight.shape, m.weight, m.bias, m.eps),
    "l2norm": lambda m, x: functional.normalize(x, dim=-1, eps=m.eps),
    "fixnorm": lambda m, x: functional.normalize(x, dim=-1, eps=m.eps) * x.shape[-1] ** 0.5,
    "scalenorm": lambda m, x: functional.normalize(x, dim=-1, eps=m.eps) * m.weight,
    "dyt": lambda m, x: m.weight * torch.tanh(m.alpha * x),
    "derf": lambda m, x: m.weight * torch.erf(m.alpha * x + m.shift) + m.bias,
}
"""The same in torch's own operations."""


POWERS = {"usual": (-3, 3), "wide": (-15, 12), "extreme": (12, 15)}
"""Of ten: scales of x. At the extreme the cube of 1 / x leaves float32's normal range, and with it
the exactness of gradients."""


def passed(
    function: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor, g: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient, for the gradient `g` of the output."""
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = function(x)
    y.backward(g)
    grads = {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "gradient of x": x.grad, **grads}  # type: ignore[dict-item]


def made_input(trial: Trial, generator: torch.Generator) -> Tensor:
    """Rows of a drawn width and scale; every fifth trial with a row of zeros and an equal one."""
    width, (kind, powers) = trial.rng.choice(WIDTHS), list(POWERS.items())[trial.index % 3]
    trial.note(kind)
    scale = 10 ** trial.rng.uniform(*powers)
    x = torch.randn(6, width, generator=generator) * scale
    if trial.index % 5 == 0:
        x[0], x[1] = 0.0, scale
    return x


@bar("N8", "every norm in float32 and bf16 against float64", total=200, ci=30)
def norms(trial: Trial) -> None:
    generator = torch.Generator().manual_seed(trial.rng.randrange(2**31))
    x = made_input(trial, generator)
    g = torch.randn(x.shape, generator=generator)
    for name in list_norms():
        norm = operation(name)(x.shape[-1])
        with torch.no_grad():
            for p in norm.parameters():
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
        exact = copy.deepcopy(norm).double()
        reference = passed(exact, exact, x.double(), g.double())
        got = passed(norm, norm, x, g)
        eager = passed(partial(EAGER[name], norm), norm, x, g) if name in EAGER else None
        for what, wanted in reference.items():
            assert got[what].isfinite().all(), (name, what)
            error = (got[what].double() - wanted).norm()
            allowed = 5e-7 * wanted.norm() + torch.finfo(torch.float32).tiny
            if eager is not None:
                allowed = max(allowed, 2 * (eager[what].double() - wanted).norm())
            if name == "layernorm" and (trial.index % 5 == 0 or x.shape[-1] == 2):
                continue  # what is left of equal features without their mean is rounding
            if what == "output" or (eager is not None and trial.index % 3 < 2):
                assert error <= allowed, (name, what, x.shape, float(error), float(allowed))
        half = x.bfloat16()
        wanted = exact(half.double()).detach()
        off = (norm(half).detach().double() - wanted).abs()
        assert (off <= 2**-8 * wanted.abs() + 1e-37).all(), (name, "bfloat16", x.shape)
