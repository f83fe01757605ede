"""A polite stop: a signal asks, the loop answers at the next step boundary with a checkpoint."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

logger = logging.getLogger(__name__)

STOPPED_BY_SIGNAL = 75
"""Exit code of a run that saved and left because of SIGTERM, SIGINT or SIGUSR1: start it again to
continue (the number is sysexits' EX_TEMPFAIL, "try again later")."""
_INTERRUPTED = 128 + signal.SIGINT

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to stop."""
_AT_ONCE_SECONDS = 5.0

Item = TypeVar("Item")
Leave = Callable[[int, str], None]
"""Ends the process with an exit code and a cause; see `llmnorm.training.endings`."""


class Stopping(BaseException):
    """The run leaves at this step boundary; all ranks agree."""


class _Woken(BaseException):
    """A signal came while the main thread waited for data."""


class StopRequest:
    """Remembers that a signal came; a second SIGINT within five seconds ends the process at once.

    Until the first step is done there is nothing to save: a signal then ends the process at once,
    too (`leave_at_once` to `stay`). Use as a context manager around the whole run; the handlers of
    before are restored.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._leave: Leave = lambda code, _: os._exit(code)
        self.starting = False
        self._waiting = False
        self._pid = os.getpid()
        self._last_interrupt = -_AT_ONCE_SECONDS

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker got its parent's handler
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._last_interrupt < _AT_ONCE_SECONDS:
                self._leave(_INTERRUPTED, "interrupted twice")
            self._last_interrupt = now
        self.ask(number)
        if self._waiting:
            self._waiting = False
            raise _Woken

    def ask(self, number: int) -> None:
        """Note a signal; may be called from another thread while the main one is in C code."""
        self.signal_name = self.signal_name or signal.Signals(number).name  # the first one's
        if self.starting:
            self._leave(STOPPED_BY_SIGNAL, f"{self.describe()} before the first step")

    def leave_at_once(self, leave: Leave) -> None:
        """From now on a signal ends the process by `leave`; so does one that came before."""
        self._leave = leave
        self.starting = True
        if self.signal_name is not None:
            self._leave(STOPPED_BY_SIGNAL, f"{self.describe()} before the first step")

    def stay(self) -> None:
        """From now on a signal waits for the next step boundary."""
        self.starting = False

    @property
    def requested(self) -> bool:
        """Whether the run should stop at the next step boundary."""
        return self.signal_name is not None

    def describe(self) -> str:
        """Return who asked, for exit.json."""
        return f"stopped by {self.signal_name or 'a signal to another rank'}"

    def waiting(self, batches: Iterator[list[Item]], count: int) -> Iterator[list[Item]]:
        """Yield `count` items, or [] as soon as a signal came: it does not wait for data then."""
        for _ in range(count):
            try:
                try:
                    self._waiting = True
                    batch = [] if self.requested else next(batches)
                finally:
                    self._waiting = False
            except _Woken:
                batch = []
            yield batch
