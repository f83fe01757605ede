"""A: a run that is killed at any instant and started again ends as if nothing had happened.

Equal means: every number of every step, and every byte of the last checkpoint. Runs save while
they train, as by default. The same with several ranks and other engines: `area_a_engines.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from reliability.harness import Trial, bar
from reliability.operations import (
    before_each,
    count,
    from_the_first_save,
    killed_after,
    killed_at,
    wait_for_step,
)
from reliability.runs import PRETRAIN, clean_environment, finish, fork, outcome, run, tiny, words
from schemes import PAIRS

from llmnorm.config import RunConfig
from llmnorm.training import saving
from llmnorm.training.loop import train

THIRTY: dict[str, Any] = {"training__max_steps": 30, "checkpoint__interval_steps": 3}
TWO: dict[str, Any] = {
    "training__max_steps": 2,
    "checkpoint__interval_steps": 1,
    "checkpoint__keep": 1,
    "model__overrides__num_hidden_layers": 1,
}


@dataclass(frozen=True)
class Straight:
    """A run that was left alone."""

    expected: Any
    seconds: float
    operations: int = 0


def straight(folder: Path, **changes: Any) -> Straight:
    """Train without a disturbance."""
    config, begun = tiny(folder / "straight", **changes), time.monotonic()
    assert run(config) == 0
    return Straight(outcome(config), time.monotonic() - begun)


def thirty(folder: Path) -> Straight:
    """30 steps, saved every 3."""
    return straight(folder, **THIRTY)


def counted(folder: Path) -> Straight:
    """Two saves, the first of them during a step, and a prune; their file operations counted."""
    config = tiny(folder / "counted", **TWO)
    operations = count(lambda: train(config), folder / "operations", from_the_first_save)
    return Straight(straight(folder, **TWO).expected, 0, operations)


def continue_and_compare(config: RunConfig, expected: Any) -> None:
    """Start a killed run again; nothing of the kill may be seen."""
    assert run(config) == 0
    assert outcome(config) == expected
    left = [path.name for path in (config.output.dir / "checkpoints").glob(".*")]
    assert not left, left


@bar("A1", "SIGKILL at a random moment", total=500, ci=60, prepare=thirty)
def killed_at_random(trial: Trial) -> None:
    config = tiny(trial.folder / "run", **THIRTY)
    step = trial.rng.randrange(-3, 30)  # a tenth of the kills while the run starts
    pause = trial.shared.seconds / 30 if step >= 0 else trial.shared.seconds / 2
    code = killed_after(config, max(step, 0), trial.rng.random() * pause)
    trial.note("killed" if code == -signal.SIGKILL else "finished before")
    continue_and_compare(config, trial.shared.expected)


@bar(
    "A2",
    "SIGKILL at every file operation of a save and a prune",
    total=lambda shared: shared.operations,
    ci=50,
    prepare=counted,
)
def killed_at_an_operation(trial: Trial) -> None:
    config = tiny(trial.folder / "run", **TWO)
    code = killed_at(trial.index + 1, lambda: train(config), from_the_first_save)
    assert code == -signal.SIGKILL
    continue_and_compare(config, trial.shared.expected)


CALLS = [
    *(("rename", 1 + number) for number in range(3)),
    *(("fsync", 1 + number) for number in range(8)),
    *(("mkdir", 1 + number) for number in range(3)),
    *(("unlink", 1 + number) for number in range(3)),
    *(("rmdir", 1), ("unlinkat", 1), ("unlinkat", 3)),
]


@bar("A2s", "SIGKILL at a system call of a save, by strace", total=20, ci=0, prepare=counted)
def killed_at_a_system_call(trial: Trial) -> None:
    if not shutil.which("strace"):
        trial.skip("strace is not installed")
    call, number = CALLS[trial.index]
    config = tiny(trial.folder / "run", **TWO)
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"]
    command = [sys.executable, str(PRETRAIN), *words(trial.folder / "run", **TWO)]
    code = subprocess.run(
        ["strace", "-f", "-qq", "-o", os.devnull, *inject, *command],
        env=clean_environment({}),
        check=False,
    ).returncode
    trial.note(f"{call}: {'killed' if code else 'not reached'}")
    continue_and_compare(config, trial.shared.expected)


@bar("A4", "killed three times, also while restoring", total=40, ci=4, prepare=counted)
def killed_again_and_again(trial: Trial) -> None:
    config = tiny(trial.folder / "run", **{**TWO, "checkpoint__keep": 2})
    operations, rng = trial.shared.operations, trial.rng
    killed_at(
        rng.randrange(operations // 3, operations), lambda: train(config), from_the_first_save
    )
    folders = sorted((config.output.dir / "checkpoints").glob("step_*"))
    finished = (config.output.dir / "final").exists()  # keeping two takes fewer operations
    if len(folders) == 2 and not finished:  # so that its step is written once more
        (folders[1] / "state.json").write_text("{}")
        trial.note("a step written again")
    killed_at(rng.randrange(1, 20), lambda: train(config), before_each)
    killed_at(rng.randrange(1, operations), lambda: train(config), from_the_first_save)
    continue_and_compare(config, trial.shared.expected)


@bar("A5", "every norm in every placement, killed once", total=len(PAIRS), ci=24, seconds=120)
def killed_with_every_scheme(trial: Trial) -> None:
    norm, placement = PAIRS[trial.index]
    changes = {
        "model__norm__op": norm,
        "model__placement__name": placement,
        "training__max_steps": 4,
        "checkpoint__interval_steps": 2,
        "eval__interval_steps": 0,
    }
    expected = straight(trial.folder, **changes).expected
    config = tiny(trial.folder / "run", **changes)
    killed_after(config, 3, 0)
    continue_and_compare(config, expected)


SETTINGS = list(
    product(
        (0, 2),  # data.num_workers
        (False, True),  # data.document_mask
        (None, 4),  # training.micro_batch_size of 10 sequences: equal or not
        ("cosine", "wsd", "linear"),
        (0.0, 0.1),  # dropout of attention
    )
)


@bar("A6", "settings that move data and numbers, across an epoch", total=48, ci=12, seconds=120)
def killed_with_other_settings(trial: Trial) -> None:
    workers, masked, micro, schedule, dropout = SETTINGS[trial.index]
    changes = {
        "data__num_workers": workers,
        "data__document_mask": masked,
        "data__seq_len": 96,
        "training__global_batch_size": 10,
        "training__micro_batch_size": micro,
        "training__max_steps": 18,  # an epoch has about 14
        "schedule__name": schedule,
        "model__overrides__attention_dropout": dropout,
        "eval__interval_steps": 5,
    }
    expected = straight(trial.folder, **changes).expected
    config = tiny(trial.folder / "run", **changes)
    killed_after(config, trial.rng.randrange(1, 18), trial.rng.random() * 0.02)
    continue_and_compare(config, expected)


@bar("A7", "killed while steps go by and a save is written", total=30, ci=6, prepare=thirty)
def killed_during_a_slow_save(trial: Trial) -> None:
    config = tiny(trial.folder / "run", **THIRTY)
    step = 3 * trial.rng.randrange(1, 10)

    def with_a_slow_disk() -> object:
        real = saving.write_pieces

        def write(*args: Any) -> Any:
            time.sleep(0.2)
            return real(*args)

        saving.write_pieces = write
        return train(config)

    child = fork(with_a_slow_disk)
    wait_for_step(config, step + 1)  # written a fifth of a second before the save is
    assert (config.output.dir / "checkpoints" / f".step_{step:08d}.writing").is_dir()
    time.sleep(trial.rng.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    assert finish(child) == -signal.SIGKILL
    continue_and_compare(config, trial.shared.expected)
