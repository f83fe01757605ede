"""Where a run's numbers go: metrics.jsonl always, the terminal, and trackers that were asked for.

Only rank 0 makes these objects. A record is one JSON line; floats are written so that they read
back equal, and what is not finite is null, so that every line is strict JSON.
"""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from llmnorm.durable import write_durably
from llmnorm.errors import EnvironmentProblem
from llmnorm.training.assembly import Plan

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Append-only metrics.jsonl.

    Args:
        path: the file; it may hold the records of an earlier start.
        completed: steps of the checkpoint that the run continues from; later records are cut, and
            so is a line that a kill left unfinished, since they will be written again.
    """

    def __init__(self, path: Path, completed: int) -> None:
        if path.is_file():
            kept = [line for line, step in _records(path) if step <= completed]
            cut = path.read_bytes().count(b"\n") - len(kept)
            if cut:
                logger.info("%d records after step %d cut, to be written again", cut, completed)
            write_durably(path, "".join(kept))
        self._handle = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._waiting = b""  # what the disk refused so far

    def write(self, record: Record) -> None:
        """Append one record and hand it to the system; what a full disk refuses waits for room."""
        line = json.dumps({key: _strict(value) for key, value in record.items()}, allow_nan=False)
        refused, self._waiting = bool(self._waiting), self._waiting + f"{line}\n".encode()
        try:
            self._flush()
        except OSError as error:
            if not refused:
                logger.warning("%s cannot be written (%s): lines wait", self._handle.name, error)

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._handle.write(self._waiting) :]

    def sync(self) -> None:
        """Force all lines to the disk (before a checkpoint promises these steps).

        Raises:
            OSError: if the disk refuses.
        """
        self._flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close; what the disk refuses now was told before."""
        with suppress(OSError):
            self._flush()
        self._handle.close()


def _records(path: Path) -> Iterable[tuple[str, int]]:
    """Yield (line, step) of every whole record of a metrics file."""
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if line.endswith("\n") and isinstance(step, int):
                yield line, step


def open_trackers(names: Iterable[str], folder: Path, config: Record) -> list[GeneralTracker]:
    """Start the trackers of the run file through accelerate.

    Raises:
        EnvironmentProblem: if a tracker's package is missing or it cannot start.
    """
    trackers = []
    for name in names:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        try:
            if tracker_class.requires_logging_directory:
                tracker = tracker_class(folder.name, logging_dir=str(folder / name))
            else:
                tracker = tracker_class(folder.name)
            tracker.start()
            tracker.store_init_configuration(config)
        except ImportError as error:
            raise EnvironmentProblem(
                f"log.trackers asks for {name}, whose package is missing ({error}); "
                f"pip install 'llmnorm[{name}]' or drop it"
            ) from error
        except Exception as error:  # each tracker has its own, for no login and no network
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise EnvironmentProblem(
                f"log.trackers asks for {name}, which does not start: {first}; log in or drop it"
            ) from error
        trackers.append(tracker)
    return trackers


class Display:
    """A progress bar on a terminal, one plain line every `interval` steps elsewhere.

    Args:
        steps: steps of the whole run.
        completed: steps done before this start.
        interval: steps between plain lines.
    """

    def __init__(self, *, steps: int, completed: int, interval: int) -> None:
        self.steps = steps
        self.interval = interval
        console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[numbers]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=steps, completed=completed, numbers="")
            self._progress.start()

    def show(self, record: Record) -> None:
        """Show the numbers of one step."""
        step = record["step"]
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=summary(record))
        if "val/loss" in record or (
            self._progress is None and (step % self.interval == 0 or step in (1, self.steps))
        ):
            remaining = record["perf/eta_seconds"]
            logger.info(
                "step %d/%d  %s  eta %s", step, self.steps, summary(record), _duration(remaining)
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def summary(record: Record) -> str:
    """Return the numbers of a record in one short line."""
    parts = [f"loss {record['train/loss']:.4f}"]
    if "val/loss" in record:
        parts.append(f"val {record['val/loss']:.4f}")
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"norm {record['grad_norm']:.2f}")
    parts.append(f"{record['perf/tokens_per_second']:,.0f} tok/s")
    parts.append(f"mfu {100 * record['perf/mfu']:.0f}%")
    parts.append(f"{record['perf/memory_gib']:.1f} GiB")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Pace:
    """Throughput, utilization, memory and remaining time.

    Args:
        plan: steps of the run and tokens in each.
        utilization: model-flops utilization at one token a second over all ranks.
    """

    def __init__(self, plan: Plan, utilization: float) -> None:
        self.plan = plan
        self.utilization = utilization
        self._seconds = 0.0  # smoothed

    def measure(self, step: int, seconds: float, device: torch.device) -> Record:
        """Return the `perf/` metrics of a step that took `seconds`."""
        self._seconds = 0.9 * self._seconds + 0.1 * seconds if self._seconds else seconds
        rate = self.plan.tokens_per_step / seconds
        return {
            "perf/tokens_per_second": rate,
            "perf/step_seconds": seconds,
            "perf/mfu": rate * self.utilization,
            "perf/memory_gib": peak_memory(device) / 2**30,
            "perf/eta_seconds": self._seconds * (self.plan.steps - step),
        }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Reporter:
    """Hands each record to the file, the display and the trackers."""

    def __init__(
        self, file: MetricsFile, display: Display, trackers: Iterable[GeneralTracker] = ()
    ) -> None:
        self.file = file
        self.display = display
        self.trackers = list(trackers)

    def report(self, record: Record) -> None:
        """Record one step everywhere."""
        self.file.write(record)
        self.display.show(record)
        finite = {k: v for k, v in record.items() if k != "step" and _strict(v) is not None}
        self._each(lambda tracker: tracker.log(finite, step=record["step"]))

    def close(self) -> None:
        """Close all of them."""
        self.display.close()
        self.file.close()
        self._each(lambda tracker: tracker.finish())

    def _each(self, work: Callable[[GeneralTracker], object]) -> None:
        """Do `work` with every tracker; one that fails is dropped, and the run goes on."""
        for tracker in list(self.trackers):
            try:
                work(tracker)
            except Exception as error:  # each has its own, for a full disk and no network
                self.trackers.remove(tracker)
                logger.warning(
                    "tracker %s failed and gets nothing more (%s); metrics.jsonl has all numbers",
                    *(tracker.name, f"{type(error).__name__}: {error}"),
                )
