"""I: the same run gives the same numbers, whatever surrounds it."""

import builtins
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from reliability.engines import finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import PRETRAIN, clean_environment, finish, fork, outcome, tiny, words

from llmnorm.training.loop import train

PLACES = [("plain", 1), ("plain", 2), *((name, 2) for name in ("fsdp2", "zero1", "zero2", "zero3"))]

Outcome = tuple[list[dict[str, Any]], dict[str, Any]]


def engines(_: Path) -> None:
    """Import them once."""
    import_engines()


@bar(
    "I1",
    "the same seed twice: every bit, on every engine",
    total=30,
    ci=6,
    seconds=120,
    prepare=engines,
)
def same_seed_twice(trial: Trial) -> None:
    engine, world = PLACES[trial.index % len(PLACES)]
    trial.note(f"{engine}-{world}")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        trial.skip("deepspeed is not installed")
    changes = {"training__seed": trial.rng.randrange(2**31), "training__max_steps": 20}
    outcomes = []
    for name in ("one", "other"):
        folder = trial.folder / name
        finished(engine, world, words(folder, **changes), trial.folder / f"{name}.logs")
        outcomes.append(outcome(tiny(folder, **changes)))
    assert outcomes[0] == outcomes[1]


def straight(folder: Path) -> Outcome:
    """Numbers and files of a run that nothing disturbs."""
    config = tiny(folder / "run")
    train(config)
    return comparable(config)


def comparable(config: Any) -> Outcome:
    """The outcome without validation losses, whose interval may differ."""
    records, files = outcome(config)
    return [{k: v for k, v in r.items() if k != "val/loss"} for r in records], files


def forked(trial: Trial, disturb: Callable[[random.Random], None] | None = None, **changes: Any):
    """Run in a child in which `disturb` was called."""
    config = tiny(trial.folder / "run", **changes)

    def work() -> int:
        if disturb is not None:
            disturb(trial.rng)
        return train(config)

    assert finish(fork(work)) == 0
    return comparable(config)


def fresh(trial: Trial, **environment: str) -> Outcome:
    """Run in a new interpreter with this environment, in shuffled order."""
    items = list(clean_environment(environment).items())
    trial.rng.shuffle(items)
    command = [sys.executable, str(PRETRAIN), *words(trial.folder / "run")]
    subprocess.run(command, env=dict(items), stdin=subprocess.DEVNULL, check=True)
    return comparable(tiny(trial.folder / "run"))


def shuffle_folders(rng: random.Random) -> None:
    """List every folder in an order of its own."""
    real_list, real_scan = os.listdir, os.scandir

    def listdir(*args: Any) -> list[Any]:
        names = real_list(*args)
        rng.shuffle(names)
        return names

    @contextlib.contextmanager
    def scandir(*args: Any) -> Any:
        with real_scan(*args) as found:
            entries = list(found)
        rng.shuffle(entries)
        yield iter(entries)

    os.listdir, os.scandir = listdir, scandir  # type: ignore[assignment]


def shift_clock(rng: random.Random) -> None:
    """Another time of day, that runs backwards."""
    start, real = rng.randrange(2**31), time.time
    begun = real()
    time.time = lambda: start - (real() - begun)  # type: ignore[assignment]


def draw_before(rng: random.Random) -> None:
    """Generators that somebody has used already."""
    random.seed(rng.random())
    torch.manual_seed(rng.randrange(2**31))


def change_id(_: random.Random) -> None:
    """Objects at other addresses, so that what is ordered by id is in another order."""
    builtins.ballast = [bytearray(1000 + 7 * n) for n in range(5000)]  # type: ignore[attr-defined]


SURROUNDINGS: dict[str, Callable[[Trial], Outcome]] = {
    "PYTHONHASHSEED 0": lambda t: fresh(t, PYTHONHASHSEED="0"),
    "PYTHONHASHSEED drawn": lambda t: fresh(t, PYTHONHASHSEED=str(t.rng.randrange(1, 2**32))),
    "locale and time zone": lambda t: fresh(t, LC_ALL="C", LANG="C", TZ="Asia/Kathmandu"),
    "order of folders": lambda t: forked(t, shuffle_folders),
    "clock": lambda t: forked(t, shift_clock),
    "used generators": lambda t: forked(t, draw_before),
    "addresses": lambda t: forked(t, change_id),
    "one worker": lambda t: forked(t, data__num_workers=1),
    "three workers": lambda t: forked(t, data__num_workers=3),
    "log interval": lambda t: forked(t, log__interval_steps=1),
    "eval interval": lambda t: forked(t, eval__interval_steps=t.rng.choice([0, 1, 5])),
    "checkpoint interval": lambda t: forked(t, checkpoint__interval_steps=t.rng.choice([0, 1, 5])),
}


@bar("I3", "what surrounds a run changes no bit", total=12, ci=12, prepare=straight)
def surroundings(trial: Trial) -> None:
    name, attempt = list(SURROUNDINGS.items())[trial.index]
    trial.note(name)
    assert attempt(trial) == trial.shared


@bar("I5", "two threads give the losses of one to 5e-7", total=1, ci=1, prepare=straight)
def threads(trial: Trial) -> None:
    both = forked(trial, lambda _: torch.set_num_threads(2))
    for one, other in zip(trial.shared[0], both[0], strict=True):
        assert abs(other["train/loss"] - one["train/loss"]) <= 5e-7 * one["train/loss"]
    trial.note("the same bits" if both == trial.shared else "other bits")
