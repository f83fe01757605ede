"""A polite stop: a signal asks, the loop answers at the next step boundary with a checkpoint."""

import logging
import os
import signal
import time
from types import FrameType

logger = logging.getLogger(__name__)

STOPPED_BY_SIGNAL = 75
"""Exit code of a run that saved and left because of SIGTERM, SIGINT or SIGUSR1: start it again to
continue (the number is sysexits' EX_TEMPFAIL, "try again later")."""

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AT_ONCE_SECONDS = 5.0


class StopRequest:
    """Remembers that a signal came; a second SIGINT within five seconds ends the process at once.

    Use as a context manager around the whole run; the handlers of before are restored.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._last_interrupt = -_AT_ONCE_SECONDS

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._last_interrupt < _AT_ONCE_SECONDS:
                os._exit(128 + signal.SIGINT)
            self._last_interrupt = now
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether the run should stop at the next step boundary."""
        return self.signal_name is not None

    def describe(self) -> str:
        """Return who asked, for exit.json."""
        return f"stopped by {self.signal_name or 'a signal to another rank'}"
