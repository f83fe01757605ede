"""F: a full disk, little memory, poor surroundings: a run goes on, or says in one line why not."""

import ctypes
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.harness import Trial, bar
from reliability.runs import PRETRAIN, clean_environment, outcome, run, tiny, words
from reliability.told import Told, told

from llmnorm.training import saving
from llmnorm.training.manifest import names_of, verify

SAVED: dict[str, Any] = {"checkpoint__interval_steps": 2, "checkpoint__keep": 2}
PAGE = 4096
CLONE_NEWNS = 0x20000


@dataclass(frozen=True)
class Straight:
    """A run that met nothing, and the room it took in bytes: the checkpoint, the rest."""

    expected: Any
    checkpoint: int
    rest: int


def straight(folder: Path) -> Straight:
    """Train without a disturbance."""
    config = tiny(folder / "run", **SAVED)
    assert run(config) == 0
    last = max((config.output.dir / "checkpoints").iterdir())
    rest = [p for p in config.output.dir.iterdir() if p.name not in ("checkpoints", "final")]
    return Straight(outcome(config), room(last), sum(map(room, rest)))


def room(path: Path) -> int:
    """What a path takes on a tmpfs."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files if file.is_file())


def own_disk(trial: Trial, size: int) -> Path:
    """Mount a tmpfs that only this trial sees and that goes with it."""
    disk, libc = trial.folder / "disk", ctypes.CDLL(None, use_errno=True)
    disk.mkdir()
    if libc.unshare(CLONE_NEWNS) != 0:
        trial.skip("no right to mount a disk of the trial's own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    return disk


class Ballast(logging.Handler):
    """Takes room on a disk, until so many saves have failed; looks at what they left."""

    def __init__(self, path: Path, size: int, checkpoints: Path, failures: int) -> None:
        super().__init__()
        self.path, self.checkpoints, self.failures = path, checkpoints, failures
        path.write_bytes(bytes(size))

    def emit(self, record: logging.LogRecord) -> None:
        """Look at each warning of a failed save."""
        if "training goes on" not in record.getMessage():
            return
        assert [path.name for path in self.checkpoints.iterdir()] == ["step_00000002"]
        verify(self.checkpoints / "step_00000002")
        self.failures -= 1
        if not self.failures:
            self.path.unlink()


@bar("F1", "the disk is full in each part of a save", total=20, ci=6, prepare=straight)
def full_disk(trial: Trial) -> None:
    part, failures, known = trial.index / 20, 1 + trial.index % 3, trial.index % 4 == 0
    shared, size = trial.shared, 16 * 2**20
    disk = own_disk(trial, size)
    config = tiny(disk / "run", **SAVED)
    spare = saving._SPARE_BYTES if known else 0
    free = spare + shared.rest + int((1 + part) * shared.checkpoint)
    checkpoints = disk / "run" / "checkpoints"
    ballast = Ballast(disk / "ballast", size - free, checkpoints, failures)

    def fill() -> None:
        logging.getLogger("llmnorm.training.saving").addHandler(ballast)
        if not known:  # others take the room after it was looked for
            saving._SPARE_BYTES = -(2**40)

    seen = told(config, trial.folder / "log", fill)
    warned = seen.having("training goes on")
    trial.note(f"{len(warned)} failed, exit code {seen.code}")
    for line in warned:
        assert len(line) <= 300
        assert str(disk) in line
        assert len(re.findall(r"\d+ (bytes|are free)|needs \d+", line)) == 2, line
    if failures == 3:
        assert (len(warned), seen.code) == (2, 5), seen.lines
        assert "3 in a row" in seen.cause()
        assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
        (disk / "ballast").unlink()
        seen = told(config, trial.folder / "log")
    assert seen.code == 0, seen.lines
    assert len(warned) == min(failures, 2)
    assert outcome(config) == shared.expected


WRITING = ".step_00000002.writing"
FILES = (*names_of(0, 1), "state.json")
ON_FILES = (("openat", "ENOSPC"), ("write", "ENOSPC"), ("write", "EIO"), ("fsync", "EIO"))
FAULTS = [
    *((call, error, f"{WRITING}/{name}") for name in FILES for call, error in ON_FILES),
    ("mkdir", "ENOSPC", WRITING),
    ("fsync", "EIO", WRITING),
    ("rename", "EIO", WRITING),
    ("write", "ENOSPC", f"{WRITING}/.manifest.json.writing"),
]


@bar("F1s", "a system call of a save refuses, by strace", total=len(FAULTS), ci=0, prepare=straight)
def refused_call(trial: Trial) -> None:
    if not shutil.which("strace"):
        trial.skip("strace is not installed")
    call, error, name = FAULTS[trial.index]
    path = trial.folder / "run" / "checkpoints" / name
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}", "-P", str(path)]
    seen = started(trial, ["strace", "-f", "-qq", "-o", os.devnull, *inject])
    trial.note(f"{call} {error}")
    assert seen.code == 0, seen.lines
    assert len(seen.having("saving step_00000002 failed, training goes on")) == 1, seen.lines
    assert outcome(tiny(trial.folder / "run", **SAVED)) == trial.shared.expected


def started(
    trial: Trial,
    under: list[str],
    before: Callable[[], object] | None = None,
    env: dict[str, str] | None = None,
    **changes: Any,
) -> Told:
    """Run train/pretrain.py in a process of its own, `under` a command."""
    log = trial.folder / "started.log"
    command = [*under, sys.executable, str(PRETRAIN)]
    with log.open("wb") as file:
        code = subprocess.run(
            [*command, *words(trial.folder / "run", **{**SAVED, **changes})],
            env=clean_environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=before,
            check=False,
        ).returncode
    return Told(code, log.read_text(errors="replace").splitlines())


LARGER = {
    "model__overrides": {"num_hidden_layers": 4, "hidden_size": 512},
    "training__max_steps": 4,
    "checkpoint__interval_steps": 1,
}
MEGABYTES = (1, 8, 24, 48, 72, 96, 160, 4096)


@bar("F2", "little memory: trained, or one line", total=8, ci=4)
def little_memory(trial: Trial) -> None:
    config, more = tiny(trial.folder / "run", **LARGER), MEGABYTES[trial.index] * 2**20

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))

    seen = told(config, trial.folder / "log", limit)
    trial.note(f"{MEGABYTES[trial.index]} MB: exit code {seen.code}")
    if seen.code:
        assert seen.code == 3, seen.lines
        assert "training.micro_batch_size" in seen.cause()
    assert bool(seen.code) >= (trial.index == 0)
    assert bool(seen.code) <= (trial.index < len(MEGABYTES) - 1)


def _private(run: Path) -> None:
    shared = [path for path in run.rglob("*") if path.stat().st_mode & 0o077]
    assert not shared, shared


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def _one_core() -> None:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])


def _closed() -> None:
    os.close(0)


def _mute() -> None:
    os.close(1)


WITHOUT_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k,ro x /dev/shm && "$@"', "x"]
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "64 open files": {"before": _few_files, "data__num_workers": 2},
    "no home": {"env": {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}},
    "no shared memory": {"under": WITHOUT_SHM},
    "no network": {"under": ["unshare", "-n"]},
    "LANG=C": {"env": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}},
    "umask 077": {"before": lambda: os.umask(0o077)},
    "standard input closed": {"before": _closed},
    "no folder for temporary files": {"env": {"TMPDIR": "/nonexistent"}},
    "one core": {"before": _one_core},
    "standard output closed": {"before": _mute},
    "dumb terminal": {"env": {"TERM": "dumb", "COLUMNS": "1", "NO_COLOR": "1"}},
    "no environment": {"env": {"PATH": "", "LANG": ""}},
}


@bar("F3", "poor surroundings", total=len(SURROUNDINGS), ci=3, seconds=120, prepare=straight)
def poor_surroundings(trial: Trial) -> None:
    name = list(SURROUNDINGS)[trial.index]
    trial.note(name)
    options = dict(SURROUNDINGS[name])
    under = options.pop("under", [])
    if under and subprocess.run([*under[:2], "true"], check=False).returncode:
        trial.skip("no right to make a namespace")
    seen = started(trial, under, **options)
    assert seen.code == 0, seen.lines
    config = tiny(trial.folder / "run", **SAVED)
    assert outcome(config) == trial.shared.expected
    if name == "umask 077":
        _private(config.output.dir)
