"""A process's file operations, one by one: where a trial kills it or lets the disk refuse.

Python's own calls are counted, in every thread: open for writing, write, fsync, rename, replace,
mkdir, unlink, rmdir. What a library writes by itself (the model in `final/`) counts as none.
"""

import builtins
import io
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.runs import finish, fork

from llmnorm.config import RunConfig
from llmnorm.training.loop import train
from llmnorm.training.saving import Saver

NAMES = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")

Act = Callable[[int, str], object]


class Handle:
    """A file open for writing, each write of which is an operation."""

    def __init__(self, file: Any, before: Callable[[str], None]) -> None:
        self._file, self._before = file, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Write, after the act."""
        self._before("write")
        return int(self._file.write(data))


def before_each(act: Act) -> None:
    """From now on call `act(number, name)` before each file operation; there is no way back."""
    numbers, real_open = itertools.count(1), io.open

    def before(name: str) -> None:
        act(next(numbers), name)

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before(name)
            return real(*args, **options)

        return call

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode in ("r", "rb", "rt"):
            return real_open(file, mode, *args, **options)
        before("open")
        return Handle(real_open(file, mode, *args, **options), before)

    for name in NAMES:
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = io.open = opened  # type: ignore[assignment]


def kill_at(number: int) -> Act:
    """An act that ends this process by SIGKILL before operation `number`."""
    return lambda seen, _: seen == number and os.kill(os.getpid(), signal.SIGKILL)


def from_the_first_save(act: Act) -> None:
    """As `before_each`, from the moment that a run begins to save."""
    real = Saver.save

    def save(*args: Any, **options: Any) -> None:
        Saver.save = real  # type: ignore[method-assign]
        before_each(act)
        real(*args, **options)

    Saver.save = save  # type: ignore[method-assign]


def count(work: Callable[[], object], report: Path, arm: Callable[[Act], None]) -> int:
    """Return the number of file operations of `work`, done in a child."""

    def counting() -> None:
        seen = [0]
        arm(lambda number, _: seen.append(number))
        work()
        total = max(seen)  # before the report's own operations
        report.write_text(str(total))

    assert finish(fork(counting)) == 0
    return int(report.read_text())


def killed_at(number: int, work: Callable[[], object], arm: Callable[[Act], None]) -> int:
    """Do `work` in a child that is killed before operation `number`; return its exit code."""

    def dying() -> object:
        arm(kill_at(number))
        return work()

    return finish(fork(dying))


def wait_for_step(config: RunConfig, step: int, seconds: float = 60) -> None:
    """Wait until so many steps are recorded (0: do not)."""
    path, end = config.output.dir / "metrics.jsonl", time.monotonic() + seconds
    while step and time.monotonic() < end:
        if path.is_file() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


def killed_after(config: RunConfig, step: int, seconds: float) -> int:
    """Train in a child and kill it `seconds` after step `step` was recorded; its exit code."""
    child = fork(lambda: train(config))
    wait_for_step(config, step)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finish(child)
