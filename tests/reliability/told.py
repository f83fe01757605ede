"""A run as its user sees it: the exit code, and the lines on standard error."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability.runs import finish, fork

from llmnorm.cli import run_main
from llmnorm.config import RunConfig
from llmnorm.training.loop import train


@dataclass(frozen=True)
class Told:
    """What a run left: its exit code and its lines."""

    code: int
    lines: list[str]

    def cause(self) -> str:
        """The one line that says why the run failed, which must be short and the last."""
        assert self.code != 0, "the run did not fail"
        assert not any(line.startswith("Traceback") for line in self.lines), self.lines
        assert self.lines, "nothing was said"
        assert len(self.lines[-1]) <= 300, self.lines[-1]
        return self.lines[-1]

    def having(self, *parts: str) -> list[str]:
        """The lines in which all of `parts` stand."""
        return [line for line in self.lines if all(part in line for part in parts)]


def told(config: RunConfig, log: Path, before: Callable[[], object] = lambda: None) -> Told:
    """Train in a child as the command does, after `before`; return what its user sees."""

    def work() -> int:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(target, stream)
        logging.getLogger("llmnorm").handlers = []
        sys.argv = ["train"]
        before()
        try:
            run_main(lambda _: train(config))
        except SystemExit as left:
            return int(left.code or 0)

    code = finish(fork(work))
    return Told(code, log.read_text(errors="replace").splitlines())
