"""E: steps that must not count are skipped without a trace; spikes are told from noise."""

import json
import math
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from reliability.engines import Group, import_engines
from reliability.harness import Trial, bar
from reliability.runs import finish, fork, tiny, words
from torch import Tensor
from training.conftest import metrics

from llmnorm.config import load_run_config
from llmnorm.training.loop import Trainer, train
from llmnorm.training.objective import IGNORED, Objective
from llmnorm.training.spikes import SpikeDetector

PLACES = [("plain", 1), *((name, 2) for name in ("plain", "fsdp2", "zero1", "zero2", "zero3"))]
VALUES = (math.nan, math.inf, -math.inf)
STEPS = 8
Poison = Callable[[Tensor], Tensor]


def engines(_: Path) -> None:
    """Import them once."""
    import_engines()


def bad_loss(value: float) -> Poison:
    """Add `value` to the loss."""
    return lambda loss: loss + value


class OneElement(torch.autograd.Function):
    """The identity; one element of its gradient becomes `value`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: float) -> Tensor:
        ctx.value = value
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient.view(-1)[3] = ctx.value
        return gradient, None


class Poisoned:
    """Patches training so that some steps are bad on one rank, and looks at what they change.

    Args:
        steps: 0-based steps to poison.
        rank: the rank that meets it.
        hidden: changes the last hidden states of a poisoned step.
        loss: changes its loss sum.
    """

    def __init__(
        self,
        steps: set[int],
        rank: int,
        *,
        hidden: Poison = lambda hidden: hidden,
        loss: Poison = lambda loss: loss,
    ) -> None:
        self.changed: list[bool] = []
        poisoning = False
        real_step, real_loss = Trainer.take_step, Objective.chunk_loss

        def chunk_loss(self: Objective, states: Tensor, targets: Tensor) -> Tensor:
            if not poisoning:
                return real_loss(self, states, targets)
            return loss(real_loss(self, hidden(states), targets))

        def take_step(trainer: Trainer, batches: Any) -> Any:
            nonlocal poisoning
            bad = trainer.step in steps
            before = held(trainer)
            poisoning = bad and trainer.ranks.rank == rank
            result = real_step(trainer, batches)
            poisoning = False
            assert result.applied != bad, f"step {trainer.step}: {result}"
            after = held(trainer)  # the first step may add moments
            self.changed.append(any(after[key] != bits for key, bits in before.items()))
            return result

        Objective.chunk_loss = chunk_loss  # type: ignore[method-assign]
        Trainer.take_step = take_step  # type: ignore[method-assign]


def held(trainer: Trainer) -> dict[tuple[str, str, int], bytes]:
    """Every bit of weights and moments that this rank owns."""
    return {
        (piece.name, piece.slot, piece.start): piece.tensor.detach().cpu().numpy().tobytes()
        for piece in trainer.engine.pieces()
    }


@bar("E1", "a bad step on one rank changes nothing", total=90, ci=5, seconds=120, prepare=engines)
def bad_step_changes_nothing(trial: Trial) -> None:
    engine, world = PLACES[trial.index % len(PLACES)]
    trial.note(f"{engine}-{world}")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        trial.skip("deepspeed is not installed")
    kind, when = divmod(trial.index // len(PLACES), 3)
    step = (0, STEPS // 2, STEPS - 1)[when]
    rank = trial.rng.randrange(world)
    value = VALUES[kind % 3]
    run = trial.folder / "run"
    flags = words(run, training__max_steps=STEPS)

    def work() -> int:
        if kind < 3:
            poisoned = Poisoned({step}, rank, loss=bad_loss(value))
        else:
            poisoned = Poisoned({step}, rank, hidden=lambda h: OneElement.apply(h, value))
        code = train(load_run_config(None, flags))
        expected = [number != step for number in range(STEPS)]
        assert poisoned.changed == expected, poisoned.changed
        return code

    group = Group(engine, world, flags, trial.folder / "logs", work)
    try:
        codes = group.wait(100)
        assert codes == [0] * world, f"{codes}\n{group.tail()}"
    finally:
        group.end()
    counts = [record["skipped_steps"] for record in metrics(run)]
    assert counts == [int(number >= step) for number in range(STEPS)], counts
    assert "NaN" not in (run / "metrics.jsonl").read_text()


@bar("E2", "bad steps in a row: the run ends exactly at the limit", total=20, ci=3)
def limit_of_bad_steps(trial: Trial) -> None:
    length, limit = 1 + trial.index % 10, (5, 3)[trial.index // 10]
    run = trial.folder / "run"
    changes = {"training__max_steps": 16, "checkpoint__interval_steps": 1}
    config = tiny(run, faults__max_bad_steps=limit, **changes)

    def work() -> int:
        Poisoned(set(range(4, 4 + length)), 0, loss=bad_loss(math.nan))
        return train(config)

    code = finish(fork(work))
    told = json.loads((run / "exit.json").read_text())
    if length < limit:
        assert (code, told["code"]) == (0, 0), told
        assert metrics(run)[-1]["skipped_steps"] == length
    else:
        assert (code, told["code"], told["step"]) == (6, 6, 4 + limit), told
        assert "step_00000004;" in told["cause"], told


@bar("E3", "a bad step before the window is full, and the first, is never applied", total=4, ci=1)
def bad_steps_early(trial: Trial) -> None:
    steps = ({0}, {0, 1}, {0, 3}, {1, 2, 5})[trial.index]
    run = trial.folder / "run"

    def work() -> int:
        Poisoned(steps, 0, loss=bad_loss(math.inf))  # it asserts what is applied
        return train(tiny(run))

    assert finish(fork(work)) == 0
    assert metrics(run)[-1]["skipped_steps"] == len(steps)


LENGTH, SPIKE = 2000, 10.0


def made_curve(kind: str, rng: random.Random) -> tuple[list[float], int | None]:
    """A curve of noise around a level, and the step of its spike."""
    level, noise = rng.uniform(1, 10), rng.uniform(0.01, 0.1)
    curve = [level + noise * rng.gauss(0, 1) for _ in range(LENGTH)]
    if kind == "noise":
        return curve, None
    if kind == "rise":
        return [value + 10 * noise * i / LENGTH for i, value in enumerate(curve)], None
    if kind == "shift":  # the learning rate falls, and so does the loss
        half = LENGTH // 2
        return [v - (8 * noise if i >= half else 0) for i, v in enumerate(curve)], None
    at = rng.randrange(100, LENGTH)
    curve[at] = level + SPIKE * noise
    return curve, at


@bar("E4", "of 100 made curves: few false alarms, 10-sigma spikes found", total=10, ci=1)
def detector_on_made_curves(trial: Trial) -> None:
    false, found, planted = 0, 0, 0
    for number in range(100):
        kind = ("noise", "spike", "rise", "shift")[number % 4]
        curve, at = made_curve(kind, trial.rng)
        logarithmic = number % 8 >= 4
        detector = SpikeDetector(window=128, sigma=6.0, logarithmic=logarithmic)
        seen = []
        for step, value in enumerate(curve):
            if step == LENGTH // 3:  # continued from a checkpoint
                state = json.loads(json.dumps(detector.state()))
                detector = SpikeDetector(window=128, sigma=6.0, logarithmic=logarithmic)
                detector.load_state(state)
                assert detector.state() == state
            if detector.look(value) is not None:
                seen.append(step)
                assert value not in detector.state()["window"]
        false += sum(step != at for step in seen)
        planted += at is not None
        found += at in seen
    assert false <= 100 * LENGTH / 100_000, f"{false} false alarms"
    assert found >= 0.99 * planted, f"{found} of {planted} found"


@bar("E7", "overflow, a gradient of 0, a batch without targets", total=8, ci=2)
def odd_steps(trial: Trial) -> None:
    kind = ("overflow", "no gradient", "no targets", "overflow in bf16")[trial.index % 4]
    step = (0, 5)[trial.index // 4]
    trial.note(kind)
    run = trial.folder / "run"
    precision = "bf16" if kind.endswith("bf16") else "fp32"

    def work() -> int:
        if kind.startswith("overflow"):
            Poisoned({step}, 0, hidden=lambda h: h * 3e38 * 3e38)
        elif kind == "no gradient":
            real = Objective.chunk_loss

            def flat(self: Objective, states: Tensor, targets: Tensor) -> Tensor:
                return real(self, states.detach() * 0, targets) + 0 * states.sum()

            Objective.chunk_loss = flat  # type: ignore[method-assign]
        else:
            real_step = Trainer.take_step

            def take_step(self: Trainer, batches: Any) -> Any:
                for batch in batches if self.step == step else ():
                    batch["targets"].fill_(IGNORED)
                return real_step(self, batches)

            Trainer.take_step = take_step  # type: ignore[method-assign]
        return train(tiny(run, training__precision=precision))

    assert finish(fork(work)) == 0
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    skipped = [record["skipped_steps"] for record in metrics(run)]
    never = kind == "no gradient"
    assert skipped == [0 if never else int(number >= step) for number in range(12)], skipped
