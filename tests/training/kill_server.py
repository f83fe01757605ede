"""Kills training runs and continues them; prints one JSON line with what differed.

Run as a script in a process of its own: it forks a child per trial, so it must not hold threads.
A trial starts a tiny run in a child, ends it with SIGKILL at a moment drawn from a seed (or at a
numbered file operation), lets a second child continue it, and compares metrics and the last
checkpoint with a run that was left alone.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmnorm.config import RunConfig, load_run_config
from llmnorm.training.checkpoint import verify
from llmnorm.training.loop import train

NUMBERS = ("step", "tokens", "train/loss", "lr", "grad_norm", "val/loss")
FILE_OPERATIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        sys.stderr.write(f"child: {type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(config: RunConfig) -> tuple[Any, Any]:
    """Numbers of all steps, and the hashes of the last checkpoint's files."""
    run = config.output.dir
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: record[key] for key in NUMBERS if key in record} for record in records]
    last = run / "checkpoints" / f"step_{records[-1]['step']:08d}"
    return numbers, verify(last)["files"]


def wait_for_step(config: RunConfig, step: int) -> None:
    """Wait until so many steps are recorded (0: do not)."""
    path, end = config.output.dir / "metrics.jsonl", time.monotonic() + 60
    while step and time.monotonic() < end:
        if path.is_file() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


def count_operations(kill_at: int | None, report: Path) -> None:
    """Number the file operations of this process; SIGKILL itself before number `kill_at`."""
    seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    import safetensors.torch

    import llmnorm.training.checkpoint as checkpoint
    import llmnorm.training.pieces as pieces

    save_file = counted(safetensors.torch.save_file)
    checkpoint.save_file = pieces.save_file = save_file
    if kill_at is None:
        import atexit

        atexit.register(lambda: report.write_text(str(seen)))


def main(words_file: str, kind: str, trials: int, seed: int) -> None:
    torch.set_num_threads(1)
    words = json.loads(Path(words_file).read_text())
    base = Path(words_file).parent

    def config(name: str) -> RunConfig:
        return load_run_config(None, [*words, "--output.dir", str(base / name)])

    straight, timed = config("straight"), config("timed")
    train(straight)  # in this process, so that children fork with everything imported
    expected = outcome(straight)
    begun = time.monotonic()
    assert finish(fork(lambda: train(timed))) == 0
    duration = time.monotonic() - begun
    operations = 0
    if kind == "operation":
        counting, report = config("counting"), base / "operations"

        def count() -> None:
            count_operations(None, report)
            train(counting)
            import atexit

            atexit._run_exitfuncs()

        assert finish(fork(count)) == 0
        operations = int(report.read_text())
    rng = random.Random(seed)
    kills, wrong = 0, []
    for trial in range(trials):
        trial_config = config(f"trial{trial}")
        if kind == "operation":
            at = 1 + (operations * trial) // trials

            def die(trial_config: RunConfig = trial_config, at: int = at) -> None:
                count_operations(at, base / "unused")
                train(trial_config)

            kills += finish(fork(die)) == -signal.SIGKILL
        else:
            at = rng.random() * len(expected[0])  # in steps
            child = fork(lambda trial_config=trial_config: train(trial_config))
            wait_for_step(trial_config, int(at))
            time.sleep((at % 1) * duration / len(expected[0]))
            os.kill(child, signal.SIGKILL)
            kills += finish(child) == -signal.SIGKILL
        code = finish(fork(lambda trial_config=trial_config: train(trial_config)))
        if code != 0 or outcome(trial_config) != expected:
            wrong.append({"trial": trial, "at": at, "seed": seed, "code": code})
    result = {"kills": kills, "wrong": wrong, "operations": operations, "seconds": duration}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
