"""J: what a long run uses does not grow."""

import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
from reliability.harness import Trial, bar
from reliability.runs import finish, fork, run, tiny

from llmnorm.training import loop

MEBI = 2**20
GROWTH = 4 * MEBI  # resident memory from step 500 on
SETTINGS: list[dict[str, Any]] = [{}, {"data__num_workers": 2, "eval__interval_steps": 100}]


def sampled(config: Any, every: int, report: Path) -> int:
    """Train, noting every so many steps what this process holds."""
    process, samples = psutil.Process(), []
    real = loop.Trainer.take_step

    def take_step(self: loop.Trainer, micro_batches: Any) -> Any:
        if self.step % every == every // 2:
            held = process.memory_info().rss, process.num_fds(), process.num_threads()
            samples.append((self.step, *held, len(process.open_files())))
        return real(self, micro_batches)

    loop.Trainer.take_step = take_step  # type: ignore[method-assign]
    code = loop.train(config)
    report.write_text(json.dumps(samples))
    return code


def check_flat(trial: Trial, steps: int, settled: int, *, pace: bool) -> None:
    """Train `steps` steps; after `settled` of them nothing may grow."""
    settings = SETTINGS[trial.index]
    fixed = {"training__max_steps": steps, "checkpoint__interval_steps": steps // 5}
    config = tiny(trial.folder / "run", **{"eval__interval_steps": 0, **fixed, **settings})
    report = trial.folder / "samples"
    every = max(steps // 100, 10)
    assert finish(fork(lambda: sampled(config, every, report))) == 0
    samples = [values for step, *values in json.loads(report.read_text()) if step > settled]
    first, last = samples[: len(samples) // 4], samples[-len(samples) // 4 :]
    memory, *counts = (
        [min(sample[kind] for sample in part) for part in (first, last)] for kind in range(4)
    )
    grown = max(sample[0] for sample in last) - max(sample[0] for sample in first)
    trial.note(f"{grown / MEBI:+.1f} MiB")
    assert grown <= GROWTH, f"{grown} bytes more than {memory[0]}"
    for what, (before, after) in zip(("descriptors", "threads", "files"), counts, strict=True):
        assert after <= before, f"{what}: {before} became {after}"
    if pace:
        lines = (config.output.dir / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["perf/step_seconds"] for line in lines]
        early, late = seconds[500:1000], seconds[-500:]
        ratio = statistics.quantiles(late, n=10)[0] / statistics.quantiles(early, n=10)[0]
        trial.note(f"pace x {ratio:.3f}")
        assert ratio <= 1.05


@bar("J1", "5,000 steps: memory, descriptors, threads, pace stay", total=2, ci=0, seconds=900)
def long_run(trial: Trial) -> None:
    check_flat(trial, 5000, 500, pace=True)


@bar("J1a", "800 steps: memory, descriptors, threads stay", total=2, ci=2, seconds=120)
def shorter_run(trial: Trial) -> None:
    check_flat(trial, 800, 400, pace=False)


def check_disk(trial: Trial, saves: int) -> None:
    """Save after each step, keeping two; look at the disk all the time."""
    fixed = {"training__max_steps": saves, "checkpoint__interval_steps": 1, "checkpoint__keep": 2}
    config = tiny(trial.folder / "run", **{**fixed, "eval__interval_steps": 0})
    root = config.output.dir / "checkpoints"
    child = fork(lambda: loop.train(config))
    most = looks = 0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        names = os.listdir(root) if root.is_dir() else []
        most, looks = max(most, len(names)), looks + 1
        time.sleep(0.0005)
    assert finish(child) == 0
    trial.note(f"{looks // 100 * 100}+ looks")
    assert looks > saves
    assert most == 3  # two kept, one being written
    assert len(os.listdir(root)) == 2


@bar("J2", "1,000 saves with keep 2: never more than 3 on disk", total=1, ci=0, seconds=600)
def many_saves(trial: Trial) -> None:
    check_disk(trial, 1000)


@bar("J2a", "100 saves with keep 2: never more than 3 on disk", total=1, ci=1, seconds=120)
def some_saves(trial: Trial) -> None:
    check_disk(trial, 100)


def size_beside_checkpoints(folder: Path) -> int:
    """Bytes of a run's own files."""
    top = [path for path in folder.rglob("*") if path.is_file()]
    return sum(p.stat().st_size for p in top if not {"checkpoints", "final"} & set(p.parts))


@bar("J3", "files beside checkpoints grow by at most 1 KB a step, killed or not", total=20, ci=4)
def small_logs(trial: Trial) -> None:
    sizes = {}
    for steps in (20, 120):
        config = tiny(
            trial.folder / f"run{steps}", training__max_steps=steps, log__interval_steps=1
        )
        child = fork(lambda config=config: loop.train(config))
        if steps == 120:
            path, at = config.output.dir / "metrics.jsonl", trial.rng.randrange(1, 100)
            while not path.is_file() or path.read_bytes().count(b"\n") < at:
                time.sleep(0.001)
            time.sleep(trial.rng.random() * 0.01)
            os.kill(child, signal.SIGKILL)
            assert finish(child) == -signal.SIGKILL
            *whole, _ = path.read_text().split("\n")
            assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
            assert len(whole) >= at
            assert run(config) == 0
        else:
            assert finish(child) == 0
        sizes[steps] = size_beside_checkpoints(config.output.dir)
    assert (sizes[120] - sizes[20]) / 100 <= 1024
