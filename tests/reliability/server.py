"""The fork server: a worker prepares a bar once and forks one child for each trial.

A child leads a session of its own. When it ends, or its time is over, everything it started and
left is killed: the worker adopts orphans (Linux only), so none escapes.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from reliability.harness import Bar, Skipped, Trial

PREPARE_SECONDS = 300

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ANSWER_BYTES = 32_000  # less than a pipe holds, so that a child never waits to be read

Attempt = dict[str, Any]
Choose = Callable[[Bar, int], Sequence[int]]


def serve(
    bars: Sequence[Bar],
    folder: Path,
    seed: int,
    choose: Choose,
    send: Callable[[dict[str, Any]], None],
    *,
    show: bool = False,
) -> None:
    """Prepare once, then run the chosen trials of `bars`, which share that `prepare`.

    Args:
        bars: bars with the same `prepare`.
        folder: where trials live.
        seed: see `Trial`.
        choose: the trials to run, of a bar with so many.
        send: gets {"bar", "trials"} before a bar, each `Attempt`, and {"bar", "done"} after it.
        show: let trials write to the terminal.
    """
    adopt_orphans()
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    shared, prepare = None, bars[0].prepare
    if prepare is not None:
        prepared = folder / f"{bars[0].id}.prepared"
        prepared.mkdir(parents=True)
        signal.alarm(PREPARE_SECONDS)  # kills this worker, which fails its bars
        shared = prepare(prepared)
        signal.alarm(0)
    for bar in bars:
        total = bar.total(shared) if callable(bar.total) else bar.total
        indices = choose(bar, total)
        send({"bar": bar.id, "trials": len(indices)})
        for index in indices:
            place = folder / bar.id / str(index)
            send(attempt(bar, Trial(bar.id, index, total, place, shared, seed), show=show))
        send({"bar": bar.id, "done": True})


def attempt(bar: Bar, trial: Trial, *, show: bool = False) -> Attempt:
    """Run one trial in a child and judge it.

    Args:
        bar: what to run.
        trial: on what.
        show: let the child write to the terminal, not into the file `FOLDER.log`.
    """
    trial.folder.mkdir(parents=True)
    log = None if show else trial.folder.with_suffix(".log")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    read, write = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _live(bar, trial, write, log)
    os.close(write)
    handle = os.pidfd_open(child)
    ended = bool(select.select([handle], [], [], bar.seconds)[0])
    os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kill_descendants()
    answer = os.read(read, 2 * _ANSWER_BYTES)  # all writers are gone: this never waits
    os.close(read)
    if not ended:
        result = {"verdict": "failed", "detail": f"not done after {bar.seconds:g} s"}
    elif not answer:
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        result = {"verdict": "failed", "detail": f"the trial's process ended by {cause}"}
    else:
        result = json.loads(answer)
    if result["verdict"] != "failed":
        shutil.rmtree(trial.folder, ignore_errors=True)
        if log is not None:
            log.unlink(missing_ok=True)
    seconds = round(time.monotonic() - begun, 3)
    return {"bar": bar.id, "index": trial.index, "notes": [], **result, "seconds": seconds}


def _live(bar: Bar, trial: Trial, write: int, log: Path | None) -> NoReturn:
    """Be the child: run the trial, answer through the pipe, leave without cleaning up."""
    say, leave = os.write, os._exit  # a trial may replace them
    answer = {"verdict": "failed", "detail": "the harness failed"}
    try:
        os.setsid()
        _redirect(log)
        try:
            bar.run(trial)
            answer = {"verdict": "passed", "detail": ""}
        except Skipped as reason:
            answer = {"verdict": "skipped", "detail": str(reason)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"verdict": "failed", "detail": describe(error)}
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        notes = [note[:200] for note in trial.notes[:20]]
        say(write, json.dumps({**answer, "notes": notes}).encode()[:_ANSWER_BYTES])
        leave(0)


def describe(error: BaseException) -> str:
    """Return type and first line of an error, and the line of an area's file it came from."""
    frames = [(Path(f.filename).name, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    areas = [f" at {name}:{line}" for name, line in frames if name.startswith("area_")]
    place = areas[-1] if areas else ""
    first = str(error).partition("\n")[0][:300]
    return f"{type(error).__name__}{place}" + (f": {first}" if first else "")


def _redirect(log: Path | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is not None:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)


def adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs, so that `kill_descendants` finds them."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants() -> None:
    """End all children of this process, and theirs, which it inherits as they lose their parent."""
    while children := psutil.Process().children():
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)


def _control(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
