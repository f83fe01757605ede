"""Prove on your own machine that a run of yours continues exactly: `llmnorm verify resume RUN`.

The run is taken to a step N twice: straight on, and stopped halfway and started again. Every loss,
gradient norm and learning rate, and the checkpoint at step N (weights, optimizer, random states,
counters), must be equal bit for bit. Schedule, data and engine are the run's own; only its folder
is another. Exit code 0 when all is equal, 1 when something differs; the first such thing is named.
"""

import argparse
import json
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmnorm.config import add_run_file, load_run_config
from llmnorm.errors import ConfigError, LlmNormError
from llmnorm.training.signals import STOPPED_BY_SIGNAL

logger = logging.getLogger(__name__)

_COMPARED = ("tokens", "train/loss", "grad_norm", "lr", "skipped_steps")
_COMPARED_PREFIX = "val/"


class RunFailed(LlmNormError):  # noqa: N818 (what happened to the run)
    """A run that was to be compared did not come to its end; carries its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is verified, of which run, and how it is launched."""
    parser.add_argument("what", choices=["resume"], help="that a stopped run continues exactly")
    add_run_file(parser)
    add = parser.add_argument
    add("--steps", type=int, default=8, help="compare up to this step (%(default)s)")
    add("--processes", type=int, help="as of `llmnorm train`")
    add("--launch", metavar="COMMAND", help="launcher, as 'accelerate launch --config_file FILE'")
    add("--dir", type=Path, help="folder for the runs (default: beside output.dir)")


def run(args: argparse.Namespace) -> int:
    """Verify; print the verdict; return 0 when exact, else 1."""
    if args.steps < 2:
        raise ConfigError(f"--steps {args.steps}: expected at least 2, to stop in between")
    if args.launch and args.processes:
        raise ConfigError("--launch and --processes exclude each other: the launcher has its own")
    output = load_run_config(args.config, args.overrides).output.dir
    parent = args.dir or output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.verify-", dir=parent))
    words = [*([args.config] if args.config else []), *args.overrides]
    if args.processes:
        words += ["--processes", str(args.processes)]
    launcher = shlex.split(args.launch) if args.launch else [sys.executable]
    command = [*launcher, "-m", "llmnorm", "train", *words]
    straight = Attempt(folder / "straight", command)
    steps = straight.go_to(args.steps)
    if steps < 2:
        raise ConfigError(f"the run ends at step {steps}: nothing to stop in between")
    facts = json.loads((straight.path / "environment.json").read_text(encoding="utf-8"))
    same = ["--training.precision", facts["precision"]["name"]]  # `auto` might now choose the other
    stopped = Attempt(folder / "stopped", [*command, *same])
    stopped.go_to(steps // 2)
    stopped.go_to(steps)
    found = difference(straight.path, stopped.path, steps)
    if found is None:
        shutil.rmtree(folder)
        sys.stdout.write(
            f"exact: {steps} steps straight on, and stopped at step {steps // 2} and continued, "
            "gave the same metrics and the same checkpoint, bit for bit\n"
        )
        return 0
    repeats = found.step > steps // 2
    cause = "" if repeats else "; this is before the stop, so a run does not even repeat itself"
    sys.stdout.write(f"not exact: {found.text}{cause} (both runs: {folder})\n")
    return 1


@dataclass(frozen=True)
class Attempt:
    """A run of the user's in a folder of ours.

    Args:
        path: its run directory; what it prints goes to `PATH.log`.
        command: how `llmnorm train` is launched, with the run file and overrides.
    """

    path: Path
    command: Sequence[str]

    def go_to(self, step: int) -> int:
        """Begin or continue up to `step`; return the step reached, less if the run ends before.

        Raises:
            RunFailed: if the run ended in any other way.
        """
        ours = {
            "output.dir": str(self.path),
            "checkpoint.resume": "auto",
            "checkpoint.interval_steps": "0",
            "checkpoint.stop_at_step": str(step),
            "log.trackers": "[]",
        }
        words = [word for key, value in ours.items() for word in (f"--{key}", value)]
        log = self.path.with_suffix(".log")
        begun = time.monotonic()
        try:
            with log.open("ab") as handle:
                ended = subprocess.run(
                    [*self.command, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=handle,
                    stderr=subprocess.STDOUT,
                    check=False,
                ).returncode
        except OSError as error:
            raise ConfigError(f"--launch: {self.command[0]} cannot be run: {error}") from error
        left = read_exit(self.path)
        if left.get("code") not in (0, STOPPED_BY_SIGNAL):  # a launcher may have changed `ended`
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            cause = left.get("cause") or (lines or ["no output"])[-1]
            raise RunFailed(
                f"the {self.path.name} run did not reach step {step}: {cause} (output: {log})",
                left.get("code") or ended or 1,
            )
        seconds = time.monotonic() - begun
        logger.info("%s run: at step %d after %.1f s", self.path.name, left["step"], seconds)
        return int(left["step"])


def read_exit(run: Path) -> dict[str, Any]:
    """Return a run's exit.json, or nothing if it left none."""
    path = run / "exit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class Difference:
    """The first thing that differs between two runs, and at which step."""

    step: int
    text: str


def difference(straight: Path, stopped: Path, steps: int) -> Difference | None:
    """Return the first difference of two runs: in their metrics, else in their last checkpoint."""
    records = _numbers(straight), _numbers(stopped)
    pairs: Iterable[tuple[Any, Any]] = zip_longest(*records, fillvalue={})
    for number, (one, other) in enumerate(pairs, start=1):
        for key in sorted({**one, **other}):
            if one.get(key) != other.get(key):
                seen = f"{one.get(key)!r} straight on and {other.get(key)!r} stopped and continued"
                return Difference(number, f"{key} of step {number} is {seen}")
    name = f"step_{steps:08d}"
    left, right = (run / "checkpoints" / name for run in (straight, stopped))
    files = {path.name for folder in (left, right) for path in folder.iterdir()}
    for file in sorted(files - {"manifest.json"}):  # which holds the others' hashes
        if (what := _file_difference(left / file, right / file)) is not None:
            return Difference(steps, f"{what} in {file} of the checkpoint at step {steps} differs")
    return None


def _numbers(run: Path) -> Iterator[dict[str, Any]]:
    """Yield of each step what must repeat; times do not."""
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield {k: v for k, v in record.items() if k in _COMPARED or k.startswith(_COMPARED_PREFIX)}


def _file_difference(one: Path, other: Path) -> str | None:
    """Name what differs between two files of a checkpoint (None: no byte)."""
    if not (one.is_file() and other.is_file()):
        return "the presence of a file"
    if one.read_bytes() == other.read_bytes():
        return None
    if one.suffix == ".json":
        left, right = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
        return next((key for key in left if left[key] != right.get(key)), "the text")
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        names = set(right.keys())
        for name in sorted(left.keys()):
            if name not in names:
                return name
            pair = [f.get_tensor(name).reshape(-1).view(torch.uint8) for f in (left, right)]
            if not torch.equal(*pair):
                return name
    return "the header"
