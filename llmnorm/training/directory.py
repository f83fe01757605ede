"""The run directory: who may use it, what a new, an unfinished and a finished one look like.

    config.yaml  environment.json  metrics.jsonl  eval/  checkpoints/  final/  exit.json

`config.yaml` is written first and `final/` last, both in one piece, so a kill at any instant leaves
a directory that the next start understands.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmnorm.config import RunConfig, load_run_config
from llmnorm.durable import follow_umask, sync, take_lock, write_durably
from llmnorm.errors import CheckpointError, ConfigError, EnvironmentProblem, LlmNormError
from llmnorm.safe_files import read_json
from llmnorm.training.ranks import Ranks

logger = logging.getLogger(__name__)

_OURS = ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final")
_FOREIGN = ("manifest.json", "config.json")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunDirectory:
    """The folder of one run, used by one process at a time (rank 0).

    Args:
        path: `output.dir` of the run file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.exit_file = path / "exit.json"
        self.final = path / "final"
        self.final_in_making = path / ".final.writing"

    def open(self, config: RunConfig) -> bool:
        """Make or check the directory; return whether its run is finished already.

        Raises:
            ConfigError: if it holds another run or foreign files, or a run and `resume` is never.
            EnvironmentProblem: if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.check(config)
            if not self.final.is_dir():
                self.exit_file.unlink(missing_ok=True)  # of the start before
                shutil.rmtree(self.final_in_making, ignore_errors=True)
                if not self.has_begun():
                    self.environment_file.unlink(missing_ok=True)  # of a start that failed
                (self.path / "eval").mkdir(exist_ok=True)
                write_durably(self.config_file, config.to_yaml())
        except OSError as error:
            self.close()
            raise EnvironmentProblem(f"output.dir={self.path} cannot be used: {error}") from error
        except LlmNormError:
            self.close()
            raise
        return self.final.is_dir()

    def enter(self, config: RunConfig, ranks: Ranks) -> bool:
        """Do `open` on rank 0; return on every rank whether the run is finished already.

        Raises:
            EnvironmentProblem: if a rank sees another folder there, such as a disk of its own.
        """
        finished = ranks.on_main(lambda: self.open(config))
        seen = ranks.gather(self.config_file.is_file())
        if not all(seen):
            raise EnvironmentProblem(
                f"rank {seen.index(False)} does not find in output.dir={self.path} what rank 0 "
                "wrote there; choose a folder on a disk that all machines share"
            )
        return bool(finished)

    def _lock(self) -> None:
        """Keep other runs out until this process ends, however it ends."""
        self._handle = open(self.path / ".lock", "a")  # noqa: SIM115 (held until the run ends)
        if not take_lock(fcntl.lockf, self._handle.fileno(), self.path):
            raise EnvironmentProblem(
                f"output.dir={self.path} is in use by another run; wait for it or choose another"
            )

    def close(self) -> None:
        """Let other runs in."""
        handle = getattr(self, "_handle", None)
        if handle is not None:
            handle.close()

    def has_begun(self) -> bool:
        """Whether a step was recorded or saved; until then the run file may still change."""
        if self.final.is_dir() or any(self.checkpoints.glob("step_*")):
            return True
        if not self.metrics_file.is_file():
            return False
        with open(self.metrics_file, "rb") as handle:
            return handle.readline().endswith(b"\n")

    def check(self, config: RunConfig) -> None:
        """Refuse a directory that holds another run, or foreign files; as in `open`."""
        present = [name for name in _OURS if (self.path / name).exists()]
        foreign = [name for name in _FOREIGN if (self.path / name).exists()]
        if foreign and not present:
            raise ConfigError(
                f"output.dir={self.path} holds {foreign[0]}, so it is prepared data or a model; "
                "choose an empty or new output.dir"
            )
        if present and self.has_begun() and config.checkpoint.resume == "never":
            raise ConfigError(
                f"output.dir={self.path} holds a run ({', '.join(present)}) and checkpoint.resume "
                "is never; choose another output.dir or remove it"
            )
        if present and "config.yaml" not in present:
            raise ConfigError(
                f"output.dir={self.path} holds {', '.join(present)} but no config.yaml, so it is "
                "no run of llmnorm; choose another output.dir"
            )
        if present:
            self._check_same(config)

    def _check_same(self, config: RunConfig) -> None:
        before = load_run_config(self.config_file, ["--checkpoint.resume", "auto"])
        if not self.has_begun() or before.fingerprint() == config.fingerprint():
            return
        keys = [
            f"{key}: {old} became {new}" for key, old, new in differing_keys(before, config)
        ] or ["the shape behind model.preset changed"]
        raise ConfigError(
            f"output.dir={self.path} holds a run of another configuration ({'; '.join(keys)}); "
            "choose another output.dir, or the old values to continue it"
        )

    def publish_final(self) -> None:
        """Sync what stands in `final_in_making` and give it its name."""
        for path in sorted(self.final_in_making.rglob("*")):
            if path.is_file():
                follow_umask(path)
                sync(path)
        sync(self.final_in_making)
        os.rename(self.final_in_making, self.final)
        sync(self.path)

    @contextmanager
    def telling_when_full(self) -> Iterator[None]:
        """Say in one line what a full or read-only disk refuses, wherever the run meets it."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = getattr(error, "errno", None)
            if number in _FULL or any(f"(os error {full})" in str(error) for full in _FULL):
                raise EnvironmentProblem(
                    f"output.dir={self.path} cannot be written: {error}; make room, then start the "
                    "run again to continue it"
                ) from error
            raise

    def write_exit(self, *, code: int, step: int, cause: str, rank: int) -> bool:
        """Record how the run ended; launchers replace exit codes, this file keeps ours.

        The first of this start wins: what fails later, on any rank, is its consequence. Returns
        whether this was the first, so that one rank alone speaks.
        """
        record = {"code": code, "rank": rank, "step": step, "cause": cause[:2000]}
        try:
            with open(self.exit_file, "x", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            logger.warning("exit.json cannot be written: %s", error)
        return True

    def read_exit(self) -> dict[str, Any] | None:
        """Return what `write_exit` wrote in this start; None before, or while it is written."""
        try:
            return dict(json.loads(self.exit_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) where two run files would give other numbers."""
    before, after = flatten(old.numbers()), flatten(new.numbers())
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def tracker_config(config: RunConfig) -> dict[str, Any]:
    """Return the run file as flat values that every tracker can store."""
    flat = flatten(config.model_dump(mode="json"))
    plain = (str, int, float, bool)
    return {key: v if isinstance(v, plain) else json.dumps(v) for key, v in flat.items()}


def remember_start(
    path: Path, describe: Callable[[], dict[str, Any]], start: dict[str, Any]
) -> dict[str, Any]:
    """Return environment.json: made by the run's first start, to which later ones add a line.

    Args:
        path: environment.json.
        describe: makes the record of a first start.
        start: what is true of this start.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if path.is_file():
        try:
            record = read_json(path)
            record["restarts"].append(start)
            _ = record["data"]["fingerprint"], record["precision"]["name"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it and start the "
                "run again: it is made again, and the run continues from its checkpoint"
            ) from error
    else:
        record = {**start, **describe(), "restarts": []}
    write_durably(path, json.dumps(record, indent=1) + "\n")
    return record
