"""A thread beside the training loop that knows when another rank is gone or nothing moves.

    RUN/.beats/00001    {"beat": 7, "step": 41, "stage": "step"}, written twice a second
    RUN/.beats/stop     the name of the signal that asked some rank to stop

The loop says where it stands (`tick`); nothing here takes part in a collective. A local process
that ends without a word is seen at once, through its pid; a run that stands still by its beats.
Either way one rank says so in one line and all leave (`endings.py`). The thread also hears signals
while the main thread waits in C code, where Python's own handlers do not run.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmnorm.config import FaultsSection
from llmnorm.training.directory import RunDirectory
from llmnorm.training.endings import Ending
from llmnorm.training.launch import LAUNCHER
from llmnorm.training.ranks import Ranks
from llmnorm.training.signals import WATCHED, StopRequest

_POLL_SECONDS = 0.5
_RANKS_A_SECOND = 256
"""Beats that a shared disk is asked to write: many ranks look less often."""
_GRACE_SECONDS = 1.0
"""How long a rank may take to leave by itself after another one recorded the run's end."""
_DEATH = 3
"""Exit code when a rank died or hangs: that of `EnvironmentProblem`."""
_PARENT = -1
"""Stands among the ranks for the launcher."""
_STAGES = ("start", "data", "step", "validation", "saving", "finishing", "done")
_PATIENT = ("start", "saving", "finishing")


class Watch:
    """Watches over the ranks of a run from one of them; does nothing for a run of one process.

    Args:
        directory: the run directory, which all ranks see.
        ranks: the processes of the run.
        ending: ends this process.
        stop: hears of signals.
        faults: how long nothing may move.
    """

    def __init__(
        self,
        directory: RunDirectory,
        ranks: Ranks,
        ending: Ending,
        stop: StopRequest,
        faults: FaultsSection,
    ) -> None:
        self.directory = directory
        self.ranks = ranks
        self.ending = ending
        self.stop = stop
        self.faults = faults
        self.folder = directory.path / ".beats"
        self.stage = "start"
        self._ticks = 0
        self._beats = 0
        self._pause = max(_POLL_SECONDS, ranks.world / _RANKS_A_SECOND)  # seconds between looks
        self._passed_on = False  # a request to stop, from here or to here
        self._still = 0.0  # seconds without a tick, as far as this process was awake
        self._peers: dict[int, int] = {}  # descriptor of a local process -> its rank
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Meet the other ranks and start the thread (collective)."""
        if self.ranks.world == 1:
            return
        self.ranks.on_main(self._clear)
        self._beat()
        here = f"{socket.gethostname()}:{_namespace()}"
        places = self.ranks.gather([here, os.getpid()])
        self._wake, self._woken = os.pipe()
        for end in (self._wake, self._woken):
            os.set_blocking(end, False)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        for rank, (place, pid) in enumerate(places):
            if place == here and rank != self.ranks.rank:
                self._follow(rank, pid)
        if launcher := os.environ.get(LAUNCHER):
            self._follow(_PARENT, int(launcher))
        # A forked data worker would write its own signals into this pipe.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)
        self._wakeup_before = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def tick(self, stage: str | None = None) -> None:
        """Say that the main thread moves on (into `stage`)."""
        self._ticks += 1
        if stage is not None:
            self.stage = stage

    def close(self) -> None:
        """Stop watching; tell the others that this rank has left in order."""
        if self._thread is None:
            return
        self.stage = "done"
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._woken, b"\0")
        self._thread.join()
        self._thread = None
        for descriptor in (self._wake, self._woken, *self._peers):
            os.close(descriptor)

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def _follow(self, rank: int, pid: int) -> None:
        """Have the end of a local process wake the thread, where the system can do so."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(rank, "died")
            return
        except OSError:  # a kernel or a sandbox that does not have the call
            return
        self._peers[descriptor] = rank
        self._poll.register(descriptor, select.POLLIN)

    def _run(self) -> None:
        before, seen = time.monotonic(), -1
        while True:
            ready = self._poll.poll(self._pause * 1000)
            now = time.monotonic()
            for descriptor, _ in ready:
                if descriptor == self._wake:
                    self._hear()
                else:
                    self._lost(descriptor)
            done = self.stage == "done"  # before the beat, or it may be missing there
            self._beat()
            if done:
                return
            self._follow_exit()
            self._pass_on()
            # A process that was stopped itself, or a laptop that slept, has not waited.
            moved, seen = self._ticks != seen, self._ticks
            self._still = 0.0 if moved else self._still + min(now - before, 2 * self._pause)
            before = now
            if self._still > getattr(self.faults, self._key):
                self._stuck()

    @property
    def _key(self) -> str:
        """The key of the run file that says how long nothing may move now."""
        patient = self.stop.starting or self.stage in _PATIENT
        return "start_seconds" if patient else "hang_seconds"

    def _hear(self) -> None:
        """Take note of signals that the main thread may be too busy to handle."""
        for number in os.read(self._wake, 512):
            if number in WATCHED:  # data workers end with a SIGCHLD, which comes here too
                self.stop.ask(number)

    def _pass_on(self) -> None:
        """Let a request to stop that reached one rank wake all, which may be waiting for data."""
        path = self.folder / "stop"
        with suppress(OSError):
            if self._passed_on:
                return
            if self.stop.signal_name is not None:
                self._passed_on = True
                path.write_text(self.stop.signal_name)
            elif path.is_file():
                self._passed_on = True
                self.stop.signal_name = path.read_text() or None
                os.kill(os.getpid(), signal.SIGUSR1)

    def _beat(self) -> None:
        self._beats += 1
        beat = {"beat": self._beats, "step": self.ending.step(), "stage": self.stage}
        with suppress(OSError):  # a full disk is told by who needs it
            hidden = self.folder / f".{self.ranks.rank:05d}"
            hidden.write_text(json.dumps(beat))
            hidden.replace(self.folder / f"{self.ranks.rank:05d}")

    def _read_beat(self, rank: int) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(json.loads((self.folder / f"{rank:05d}").read_text()))
        return {"beat": 0, "step": 0, "stage": "start"}

    def _follow_exit(self) -> None:
        """Leave if another rank recorded the run's end and this one does not leave by itself."""
        end = self.directory.read_exit()
        if end is None or end["code"] == 0 or end["rank"] == self.ranks.rank:
            return
        grace = time.monotonic() + _GRACE_SECONDS
        while self.stage != "done" and time.monotonic() < grace:
            time.sleep(0.05)
        if self.stage != "done":
            self.ending.leave(end["code"], end["cause"])

    def _lost(self, descriptor: int) -> None:
        """A local process has ended."""
        rank = self._peers.pop(descriptor)
        self._poll.unregister(descriptor)
        how = _how_it_died(descriptor)
        os.close(descriptor)
        self._ended(rank, how)

    def _ended(self, rank: int, how: str) -> None:
        """Leave, if another rank ended and nobody has said why; stop, if the launcher did."""
        if rank == _PARENT:
            self.stop.ask(signal.SIGTERM)
            return
        if self._read_beat(rank)["stage"] == "done" or self.directory.read_exit() is not None:
            return
        trace = self.directory.path / f"trace-{rank:05d}.txt"
        with suppress(OSError):
            first = trace.read_text(errors="replace").partition("\n")[0]
            how += f" ({first}; see {trace})" if first else ""
        self.ending.leave(_DEATH, f"rank {rank} {how} in step {self.ending.step() + 1}")

    def _stuck(self) -> None:
        """Nothing moved here for too long: find out who is missing and leave."""
        ranks, ticks = range(self.ranks.world), self._ticks
        first = [self._read_beat(rank) for rank in ranks]
        for _ in range(3):
            time.sleep(self._pause)
            self._beat()  # the others look, too
        beats = [self._read_beat(rank) for rank in ranks]
        if self._ticks != ticks:
            return
        silent = [r for r in ranks if r != self.ranks.rank and beats[r] == first[r]]
        places = [(beat["step"], _STAGES.index(beat["stage"])) for beat in beats]
        behind = [rank for rank in ranks if places[rank] == min(places) != max(places)]
        if silent:
            who = f"{_list(silent)} no longer answers"
        else:
            who = f"{_list(behind)} stays behind" if behind else "all wait for each other"
        stands = "; ".join(
            f"{_list([r for r in ranks if places[r] == place])}: step {place[0]} done, "
            f"in {_STAGES[place[1]]}"
            for place in sorted(set(places))
        )
        cause = f"no progress for {self._still:.0f} s (faults.{self._key}): {who} ({stands})"

        def kill_silent() -> None:
            for descriptor, rank in self._peers.items():
                if rank not in silent:
                    continue
                with suppress(ProcessLookupError):  # another rank was faster
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)

        self.ending.leave(_DEATH, cause, after=kill_silent)


def _how_it_died(descriptor: int) -> str:
    """Return what the system still knows of a process that ended."""
    for ask in (_status_of_zombie, _status_after_wait):
        with suppress(OSError, ValueError, IndexError, StopIteration):
            code = os.waitstatus_to_exitcode(ask(descriptor))
            if code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            return f"left with exit code {code}"
    return "died without a word (SIGKILL, as by a lack of memory, or os._exit)"


def _status_of_zombie(descriptor: int) -> int:
    """Read the wait status from /proc, before the parent has asked for it."""
    info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    pid = next(line.split()[1] for line in info.splitlines() if line.startswith("Pid:"))
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1])


def _status_after_wait(descriptor: int) -> int:
    """Ask the kernel (Linux 6.15 or newer), after the parent has: ioctl PIDFD_GET_INFO."""
    get_info, with_exit, exit_code_at = 0xC040FF0B, 1 << 3, 60
    info = bytearray(struct.pack("=Q", with_exit).ljust(64, b"\0"))
    fcntl.ioctl(descriptor, get_info, info)
    if not struct.unpack_from("=Q", info)[0] & with_exit:
        raise OSError("no exit status")
    return int(struct.unpack_from("=i", info, exit_code_at)[0])


def _namespace() -> str:
    """Tell apart processes that cannot see each other's pids; machines may share a name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _list(ranks: list[int]) -> str:
    """Return `rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
