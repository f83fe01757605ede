"""Keep what other libraries print out of the way: stdout is for results, logs for lines."""

import contextlib
import io
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send prints to stderr, and drop progress bars where stderr is not a terminal.

    Logging and errors are not touched: handlers keep the stream that they were given.
    """
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(bars), contextlib.redirect_stderr(bars):
        yield
