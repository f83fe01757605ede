"""Progress of a long preparation: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
_LINE_SECONDS = 10.0


class PrepareProgress:
    """Show how far reading has come, the tokens written, the speed and the time left.

    Args:
        description: what is being done.
        total: what counts as finished, in the unit given to `update`; None when unknown.
        tokens: written by earlier runs, which count for no speed.
    """

    def __init__(self, description: str, total: int | None, tokens: int = 0) -> None:
        self.description, self.total, self.tokens_before = description, total, tokens
        self._begun = self._last_line = time.monotonic()
        self._first: float | None = None  # done when this run began
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[tokens]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(description, total=total, tokens="")

    def __enter__(self) -> "PrepareProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, tokens: int) -> None:
        """Say what is done of the total, and how many tokens are written."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        seconds = max(now - self._begun, 1e-9)
        speed = f"{tokens:,} tokens, {(tokens - self.tokens_before) / seconds:,.0f}/s"
        if self._bar:
            self._bar.update(self._task, completed=done, tokens=speed)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            logger.info("%s: %s%s", self.description, speed, self._remaining(done, seconds))

    def _remaining(self, done: float, seconds: float) -> str:
        gained = done - (self._first or 0.0)
        if not self.total or gained <= 0:
            return ""
        left = max(self.total - done, 0) / gained * seconds
        return f", {done / self.total:.0%}, about {left / 60:.1f} min left"
