"""Every engine as ranks of one gloo group, forked from a process that has imported everything."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from reliability.runs import fork, free_port

from llmnorm.config import load_run_config
from llmnorm.training.loop import train

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ENGINES: dict[str, dict[str, str]] = {
    "plain": {},
    "fsdp2": FSDP2,
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "DS_ACCELERATOR": "cpu",
        }
        for stage in (1, 2, 3)
    },
}
"""What a launcher puts into the environment to ask for an engine."""

Work = Callable[[], int]


class Group:
    """Ranks that run `train`, each leading a process group of its own.

    Args:
        engine: a key of `ENGINES`.
        world: number of ranks.
        words: the run's words; all ranks get the same.
        logs: folder for rank0.log, rank1.log, ...
        work: what a rank does instead of training as `words` say.
    """

    def __init__(
        self, engine: str, world: int, words: list[str], logs: Path, work: Work | None = None
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in range(world)]
        self.codes: dict[int, int] = {}
        port = str(free_port())
        place = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", **ENGINES[engine]}

        def live(rank: int) -> int:
            os.setsid()
            with self.logs[rank].open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if world > 1:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            else:
                os.environ.update(ENGINES[engine])
            return work() if work else train(load_run_config(None, words))

        self.pids = [fork(lambda rank=rank: live(rank)) for rank in range(world)]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a rank and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pids[rank], number)

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Wait for the ranks' ends; return exit codes (negative: signal; None: still there)."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes:
                    gone, status = os.waitpid(pid, os.WNOHANG)
                    if gone:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        return [self.codes.get(rank) for rank in range(len(self.pids))]

    def end(self) -> None:
        """Kill what is left."""
        for rank in range(len(self.pids)):
            if rank not in self.codes:
                self.kill(rank)
        self.wait(10)

    def tail(self) -> str:
        """The end of what every rank wrote."""
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in self.logs)


def finished(engine: str, world: int, words: list[str], logs: Path, seconds: float = 100) -> None:
    """Run an engine to its end; anything but exit code 0 on every rank is an error."""
    group = Group(engine, world, words, logs)
    try:
        codes = group.wait(seconds)
    finally:
        group.end()
    assert codes == [0] * world, f"{engine} on {world} ranks ended with {codes}:\n{group.tail()}"


def import_engines() -> None:
    """Import what the engines need here, once, so that forked ranks need not."""
    for module in ("fsdp2", "deepspeed"):
        importlib.import_module(f"llmnorm.training.engines.{module}")
