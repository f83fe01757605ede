"""How a process leaves a run that fails or is told to stop at once: one line for all ranks.

The first rank that writes exit.json speaks; whatever the others meet then is its consequence, and
they leave silently with the same code. `watch.py` ends ranks that cannot speak for themselves.
"""

import faulthandler
import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from llmnorm.config.problems import one_line
from llmnorm.environment import is_out_of_memory
from llmnorm.errors import EnvironmentProblem, LlmNormError
from llmnorm.training.directory import RunDirectory
from llmnorm.training.ranks import Ranks
from llmnorm.training.signals import STOPPED_BY_SIGNAL

logger = logging.getLogger(__name__)

_VERDICT_SECONDS = 1.5
"""How long a failed collective waits to learn of the death that caused it."""


class Crashed(LlmNormError):  # noqa: N818 (what happened to the run)
    """An error that nobody expected; the run directory holds its trace."""


class Ending:
    """Ends this process for the whole run.

    Args:
        directory: the run directory.
        ranks: the processes of the run.
        step: returns the completed steps.
    """

    def __init__(self, directory: RunDirectory, ranks: Ranks, *, step: Callable[[], int]) -> None:
        self.directory = directory
        self.rank = ranks.rank
        self.world = ranks.world
        self.step = step
        self.trace_file = directory.path / f"trace-{self.rank:05d}.txt"
        self._leaving = threading.RLock()
        self.trace_file.unlink(missing_ok=True)  # of the start before
        self._fatal = (
            None if faulthandler.is_enabled() else open(self.trace_file, "a")  # noqa: SIM115
        )
        if self._fatal is not None:
            faulthandler.enable(self._fatal)

    def close(self) -> None:
        """Let go of the file for traces; remove it if there was nothing to tell."""
        if self._fatal is not None:
            faulthandler.disable()
            self._fatal.close()
        with suppress(OSError):
            if not self.trace_file.stat().st_size:
                self.trace_file.unlink()

    def record(self, code: int, cause: str) -> bool:
        """Keep code and cause in exit.json; return whether this rank speaks for the run."""
        if code == STOPPED_BY_SIGNAL and self.step():
            logger.info("%s: saved after step %d, start again to continue", cause, self.step())
        return self.directory.write_exit(code=code, step=self.step(), cause=cause, rank=self.rank)

    def leave(self, code: int, cause: str, after: Callable[[], object] = lambda: None) -> NoReturn:
        """End this process now, from any thread, in one line or with the code of who spoke.

        `after` is done once the cause is recorded, so that it cannot become another rank's cause.
        """
        self._leaving.acquire()  # for ever: another thread that leaves waits for the end
        if self.record(code, cause):
            with suppress(OSError):
                os.write(2, f"{one_line(cause)}\n".encode())
        else:
            code = (self.directory.read_exit() or {"code": code})["code"]
        after()
        for worker in multiprocessing.active_children():
            worker.kill()
        self.close()
        os._exit(code)

    def settle(self, error: Exception) -> NoReturn:
        """Raise what this rank has to say of `error`: one line, or nothing.

        Raises:
            LlmNormError: if this rank speaks for the run.
            SystemExit: with the run's code, if another one does.
        """
        told = error if isinstance(error, LlmNormError) else self._explain(error)
        cause = str(error) if told is error else f"{type(error).__name__}: {error}"
        if not self.record(told.exit_code, cause):
            end = self.directory.read_exit() or {"code": told.exit_code}
            raise SystemExit(end["code"]) from error
        if told is not error:
            with suppress(OSError), open(self.trace_file, "a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))
        told.settled = True
        raise told from told.__cause__

    def _explain(self, error: Exception) -> LlmNormError:
        """Return one line for an unexpected error; a peer that died goes first."""
        if self.world > 1 and isinstance(error, RuntimeError):
            end = time.monotonic() + _VERDICT_SECONDS
            while time.monotonic() < end and not self.directory.exit_file.exists():
                time.sleep(0.05)
        where = f"rank {self.rank} failed in step {self.step() + 1}"
        what = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        kind: type[LlmNormError] = Crashed
        if is_out_of_memory(error):
            kind, what = EnvironmentProblem, "out of memory; lower training.micro_batch_size"
        told = kind(f"{where}: {one_line(what)[:160]}; its trace is in {self.trace_file}")
        told.__cause__ = error
        return told
