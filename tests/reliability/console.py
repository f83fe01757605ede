"""Run the command line inside a trial's own process, and judge what it said to the user."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmnorm import cli

REFUSALS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code, what it wrote, and the time it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What it told the user."""
        return self.err.splitlines()


def command(folder: Path, words: list[str], main: Callable[[list[str]], int | None]) -> Said:
    """Run `main(words)` as the command line does; what it writes goes to files in `folder`.

    An error that is not ours is raised again: for a user it would be a traceback.
    """
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    sys.argv = ["llmnorm", *words]
    begun = time.monotonic()
    with _redirected(1, out), _redirected(2, err):
        try:
            cli.run_main(main)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    seconds = time.monotonic() - begun
    return Said(code, out.read_text("utf-8"), err.read_text("utf-8"), seconds)


def llmnorm(folder: Path, *words: object) -> Said:
    """Run `llmnorm WORDS`."""
    return command(folder, [str(word) for word in words], cli._dispatch)


def check_refusal(said: Said, codes: tuple[int, ...] = REFUSALS) -> None:
    """A refusal has a code of ours and one short printable line for each problem."""
    assert said.code in codes, f"exit code {said.code}, expected one of {codes}: {said.err[-600:]}"
    assert said.lines, "nothing was said"
    for line in said.lines:
        assert line.isprintable(), f"control characters: {line!r}"
        assert 0 < len(line) <= 300, f"{len(line)} characters: {line!r}"
    assert "Traceback" not in said.err


def limit_memory(extra: int = 2**30) -> None:
    """Let this process allocate `extra` bytes more than it has mapped by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def _redirected(descriptor: int, target: Path) -> Iterator[None]:
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    stream.flush()
    before = os.dup(descriptor)
    with target.open("wb") as handle:
        os.dup2(handle.fileno(), descriptor)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(before, descriptor)
        os.close(before)
