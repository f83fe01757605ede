"""Start the processes of a run on this machine and keep its exit code.

`accelerate launch` does the same and more, but replaces exit codes and adds lines of its own.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from llmnorm.errors import ConfigError, EnvironmentProblem
from llmnorm.training.signals import STOPPED_BY_SIGNAL, WATCHED

LAUNCHER = "LLMNORM_LAUNCHER"
"""Environment variable with the launcher's pid; the ranks stop when it is gone."""

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 4.0
_LEAVING_SECONDS = 60.0
"""How long the others may take after a rank failed, or left in order."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` as the ranks of one run; return the run's exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to every rank. When a rank fails, the others have a
    few seconds to leave.

    Raises:
        ConfigError: if this process is a rank itself.
        EnvironmentProblem: if a rank was killed and no other one could say so.
    """
    if "RANK" in os.environ:
        raise ConfigError("--processes starts ranks, and a launcher has done so already; drop one")
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in WATCHED}
    port = _free_port()
    try:
        for rank in range(processes):
            own = _environment(rank, processes, port)
            # a session of its own: Ctrl-C must reach a rank once, not twice
            started.append(subprocess.Popen(command, env=own, start_new_session=True))
        return _wait(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def own_command(words: Sequence[str]) -> list[str]:
    """Return the command line of one rank of `llmnorm train WORDS`."""
    return [sys.executable, "-m", "llmnorm", "train", *words]


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the first that does not end with 0 decides."""
    first: tuple[int, int] | None = None  # rank, code
    end = float("inf")
    while None in [process.poll() for process in started] and time.monotonic() < end:
        failed = [(r, p.returncode) for r, p in enumerate(started) if p.returncode]
        if failed and first is None:
            first = failed[0]
            in_order = first[1] == STOPPED_BY_SIGNAL
            end = time.monotonic() + (_LEAVING_SECONDS if in_order else _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    codes = [process.returncode for process in started]
    first = first or next(((r, code) for r, code in enumerate(codes) if code), (0, 0))
    told = [code for code in (first[1], *codes) if code is not None and code > 0]
    if told:
        return int(told[0])
    if first[1] < 0:
        name = signal.Signals(-first[1]).name
        raise EnvironmentProblem(f"rank {first[0]} was killed by {name}; start the run again")
    return 0


def _environment(rank: int, processes: int, port: int) -> Mapping[str, str]:
    """Return this process's environment with the place of one rank."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        LAUNCHER: os.getpid(),
    }
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    shared = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1]}
    return {**shared, **os.environ, **{key: str(value) for key, value in place.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
