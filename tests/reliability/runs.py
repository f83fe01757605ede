"""Tiny training runs for trials: in forked children, and as ranks of one process group."""

import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from training.conftest import numbers, prepare_corpus, tiny_words

from llmnorm.config import RunConfig, load_run_config
from llmnorm.errors import LlmNormError
from llmnorm.training.checkpoint import verify
from llmnorm.training.loop import train

PRETRAIN = Path(__file__).resolve().parents[2] / "train" / "pretrain.py"

_LAUNCHER = ("ACCELERATE_", "FSDP_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC")


def warm_up() -> None:
    """Train a tiny model here, so that children fork with all imported and a first step done."""
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        train(tiny(Path(folder) / "run", training__max_steps=3))
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def corpus() -> Path:
    """The small prepared corpus, made once for this process and its children."""
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    if finish(fork(lambda: prepare_corpus(folder) and None)) != 0:  # its threads stay in the child
        raise RuntimeError(f"the corpus in {folder} could not be prepared")
    return folder / "prepared"


def words(output: Path, **changes: Any) -> list[str]:
    """Command-line words of a tiny run of 12 steps; `changes` name keys, `__` for the dot."""
    return tiny_words(corpus(), output, **changes)


def tiny(output: Path, **changes: Any) -> RunConfig:
    """The run file of such a run."""
    return load_run_config(None, words(output, **changes))


def fork(work: Callable[[], Any]) -> int:
    """Do `work` in a child; its exit code is what `work` returns, or that of its error."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = work() or 0
    except LlmNormError as error:
        code = error.exit_code
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(config: RunConfig) -> int:
    """Train in a child to its end."""
    return finish(fork(lambda: train(config)))


def outcome(config: RunConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Numbers of all steps, and sizes and hashes of the last checkpoint's files."""
    records = numbers(config.output.dir)
    last = config.output.dir / "checkpoints" / f"step_{records[-1]['step']:08d}"
    return records, verify(last)["files"]


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment without what a launcher put there, with `extra`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | extra


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Processes of one group, each leading a process group of its own; see `launch_ranks`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
        self.processes = processes
        self.logs = logs

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank's process group; nothing if it is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[rank].pid, number)

    def wait(self, timeout: float) -> list[int | None]:
        """Wait for all at most `timeout` seconds; return their exit codes (None: still there)."""
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.01)
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        """Kill what is left."""
        for rank, process in enumerate(self.processes):
            self.kill(rank)
            process.wait()

    @property
    def outputs(self) -> list[str]:
        """What each rank wrote so far."""
        return [log.read_text(errors="replace") for log in self.logs]


def launch_ranks(
    words: list[str],
    world: int,
    env: dict[str, str] | None = None,
    *,
    logs: Path,
    script: Path = PRETRAIN,
) -> Ranks:
    """Start `script WORDS` as `world` ranks that find each other through gloo.

    Args:
        words: the script's words, such as `words(...)` of a tiny run.
        world: number of processes.
        env: further environment, such as what chooses an engine.
        logs: folder for rank0.log, rank1.log, ...
        script: what each rank runs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": free_port()}
    processes, files = [], [logs / f"rank{rank}.log" for rank in range(world)]
    for rank, path in enumerate(files):
        own = {**place, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        with path.open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *words],
                    env=clean_environment({k: str(v) for k, v in own.items()} | (env or {})),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Ranks(processes, files)
