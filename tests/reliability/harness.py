"""Bars of reliability: what is tried, how often, and which trials a tier runs.

A bar is a function of one `Trial`; an exception means failed. Each area is a file `area_X.py`:

    @bar("A1", "SIGKILL at a random moment, then continued", total=500, ci=60, prepare=straight_run)
    def killed_at_random(trial: Trial) -> None:
        ...

Each trial lives in a child of its own (`server.py`): it may fork, be killed, patch functions.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 20261120

Prepare = Callable[[Path], Any]
Total = int | Callable[[Any], int]


class Skipped(BaseException):
    """This machine cannot do the trial; derived so that no `except Exception` swallows it."""


@dataclass
class Trial:
    """One attempt at a bar.

    Args:
        bar: the bar's name.
        index: which of the bar's trials, from 0.
        total: how many trials the bar has.
        folder: an empty folder of its own, removed when the trial passed.
        shared: what the bar's `prepare` returned.
        seed: the run's seed; `rng` is drawn from it, the bar's name and the index.
    """

    bar: str
    index: int
    total: int
    folder: Path
    shared: Any
    seed: int = SEED
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}:{self.bar}:{self.index}")

    def skip(self, reason: str) -> None:
        """Leave the trial as not tried; it is counted."""
        raise Skipped(reason)

    def note(self, text: str) -> None:
        """Say what this trial ran, such as an engine; the bar's line counts equal notes."""
        self.notes.append(text)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise and its trials.

    Args:
        id: area letter and number, such as A1.
        what: one line for tables.
        total: trials of the nightly tier, or a function of what `prepare` returned.
        ci: how many of them the CI tier runs (0: none).
        seconds: time limit of a trial, whose processes are killed when it is over.
        prepare: runs in a fresh folder before the trials, once for all bars that name it.
        run: the trial itself.
    """

    id: str
    what: str
    total: Total
    ci: int
    seconds: float
    prepare: Prepare | None
    run: Callable[[Trial], None]

    @property
    def area(self) -> str:
        """The letter of the bar's area."""
        return self.id[0]


BARS: dict[str, Bar] = {}


def bar(
    id: str,
    what: str,
    *,
    total: Total,
    ci: int,
    seconds: float = 60,
    prepare: Prepare | None = None,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function of a trial as the bar `id`; see `Bar`."""

    def register(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        if not re.fullmatch(r"[A-Z]\d+[a-z]?", id) or id in BARS:
            raise ValueError(f"{id} is taken, or is no letter and number")
        BARS[id] = Bar(
            id=id, what=what, total=total, ci=ci, seconds=seconds, prepare=prepare, run=run
        )
        return run

    return register


def choose(total: int, count: int, key: str) -> list[int]:
    """Return `count` of range(total), evenly spread and shifted by a hash of `key`.

    Another key, such as another commit, gives others, so that in time all are tried.
    """
    if count >= total:
        return list(range(total))
    shift = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    return sorted((shift + step * total // count) % total for step in range(count))
