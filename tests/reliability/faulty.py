"""Programs for ranks that go wrong at a given step, for the bars on faults."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.engines import Group

from llmnorm.cli import run_command, run_main
from llmnorm.errors import DataError
from llmnorm.training import command
from llmnorm.training.loop import Trainer

Patch = Callable[[], object]


def program(words: list[str], patch: Patch = lambda: None) -> Callable[[], int]:
    """Return what `train/pretrain.py WORDS` does, after `patch`, as the work of a forked rank."""

    def work() -> int:
        patch()
        sys.argv = ["pretrain.py", *words]
        logging.getLogger("llmnorm").handlers = []
        try:
            run_main(lambda rest: run_command(command, "pretrain.py", rest))
        except SystemExit as left:
            return int(left.code or 0)

    return work


def before_step(step: int, work: Callable[[Trainer], object]) -> None:
    """Have every rank do `work` when `step` steps are completed, before the next one."""
    real = Trainer.take_step

    def take_step(self: Trainer, batches: Any) -> Any:
        if self.step == step:
            work(self)
        return real(self, batches)

    Trainer.take_step = take_step  # type: ignore[method-assign]


def failing(kind: str, rank: int, step: int, moment: Path) -> Patch:
    """Return a patch by which `rank` fails after `step` steps; the time goes into `moment`."""

    def fail(trainer: Trainer) -> None:
        if trainer.ranks.rank != rank:
            return
        moment.write_text(str(time.time()))
        if kind == "exit":
            os._exit(9)
        elif kind == "exception":
            raise ValueError("made to fail")
        elif kind == "runtime error":
            raise RuntimeError("made to fail")
        elif kind == "data error":
            raise DataError("shard 7 is torn")
        elif kind == "segfault":
            ctypes.string_at(0)
        elif kind == "missing":  # never comes to the next collective
            time.sleep(3600)
        else:
            os.kill(os.getpid(), getattr(signal, kind))

    return lambda: before_step(step, fail)


def wait_for(mark: Path, group: Group) -> None:
    """Wait until a file is there, or the ranks are not."""
    end = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < end and len(group.codes) < len(group.pids):
        group.wait(0)
        time.sleep(0.005)
