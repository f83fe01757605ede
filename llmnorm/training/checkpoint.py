"""Checkpoints that are whole or absent: hidden folder, sync, manifest last, rename.

    checkpoints/step_00001000/
        model-RRRRR-of-NNNNN.safetensors       pieces of the weights, one file a rank
        optimizer-RRRRR-of-NNNNN.safetensors   pieces of the optimizer's state
        rng-RRRRR.safetensors                  random states
        state.json                             counters of the loop
        manifest.json                          size and SHA-256 of every file, written last

The manifest is believed only byte for byte: it ends with the hash of itself, so that a flipped bit
is found in any file. Which checkpoint is newest is read from the folders, never from a pointer.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from llmnorm.durable import follow_umask, sha256_of, sync, write_durably
from llmnorm.errors import CheckpointError
from llmnorm.training.pieces import Piece, write_pieces
from llmnorm.training.ranks import Ranks
from llmnorm.training.rng import restore_rng, rng_tensors

logger = logging.getLogger(__name__)

FORMAT = 1
_STEP = re.compile(r"^step_(\d{8,})$")


class Damaged(Exception):  # noqa: N818 (says what the folder is, not that the program erred)
    """A checkpoint whose files are not what its manifest promises."""


def _manifest_text(body: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every byte against it.

    Raises:
        Damaged: naming the first file that is missing, foreign or altered.
    """
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        manifest.pop("sha256")
        files = manifest["files"]
        promised = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise Damaged("manifest.json is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged("manifest.json is not readable") from error
    if text != _manifest_text(manifest):
        raise Damaged("manifest.json does not match its own hash")
    if manifest.get("format") != FORMAT:
        raise Damaged(f"format {manifest.get('format')} is not {FORMAT}")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(present - set(promised) - {"manifest.json"}):
        raise Damaged(f"{name} is not in the manifest")
    for name, (size, digest) in sorted(promised.items()):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes, expected {size}")
        if sha256_of(path) != digest:
            raise Damaged(f"{name} does not match its SHA-256")
    return manifest


class Checkpoints:
    """The checkpoints of a run.

    Args:
        root: the folder `checkpoints` of the run directory.
        ranks: the processes of the run; all call every method together.
        keep: how many to leave; the one just written and verified is always among them.
        facts: what a resumed run must share (`config`, `data`) and what may differ (`engine`).
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep: int, facts: dict[str, str]) -> None:
        self.root = root
        self.ranks = ranks
        self.keep = max(1, keep)
        self.facts = facts

    def save(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` completed steps and drop those beyond `keep`.

        Args:
            step: completed steps.
            pieces: what this rank owns of weights and optimizer.
            state: the loop's counters, JSON.

        Raises:
            CheckpointError: if a rank could not write; nothing of the attempt is left.
        """
        folder, hidden = self.root / f"step_{step:08d}", self.root / f".step_{step:08d}.writing"
        self.ranks.on_main(lambda: self._told(folder, lambda: self._open_hidden(hidden)))
        reports = self.ranks.gather(self._write_own(hidden, pieces, state))
        publish = partial(self._publish, hidden, folder, step, reports)
        self.ranks.on_main(lambda: self._told(folder, publish))

    def _told(self, folder: Path, work: Callable[[], None]) -> None:
        """Do `work`; what the disk refuses becomes one line."""
        try:
            work()
        except OSError as error:
            raise CheckpointError(f"saving {folder} failed: {error}") from error

    def _open_hidden(self, hidden: Path) -> None:
        """Make an empty hidden folder; clear what an earlier, killed save left."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(".step_*"):
            shutil.rmtree(left)
        hidden.mkdir()

    def _write_own(
        self, hidden: Path, pieces: Iterable[Piece], state: dict[str, Any]
    ) -> dict[str, Any]:
        """Write and sync this rank's files; return their sizes and hashes, or the error."""
        rank, world = self.ranks.rank, self.ranks.world
        shard = f"{rank:05d}-of-{world:05d}.safetensors"
        names = [f"model-{shard}", f"optimizer-{shard}", f"rng-{rank:05d}.safetensors"]
        owned = list(pieces)
        files = {}
        try:
            write_pieces(hidden / names[0], (piece for piece in owned if not piece.slot))
            write_pieces(hidden / names[1], (piece for piece in owned if piece.slot))
            save_file(rng_tensors(), hidden / names[2])
            if self.ranks.is_main:
                names.append("state.json")
                text = json.dumps(state, indent=1, sort_keys=True)
                (hidden / "state.json").write_text(text, encoding="utf-8")
            for name in names:
                path = hidden / name
                follow_umask(path)
                sync(path)
                files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        except Exception as error:  # told to all ranks, so that none waits for this one
            return {"error": f"rank {rank}: {error}"[:1000]}
        return {"files": files}

    def _publish(
        self, hidden: Path, folder: Path, step: int, reports: list[dict[str, Any]]
    ) -> None:
        """Give the hidden folder its manifest and its name (rank 0, when all have written)."""
        errors = [report["error"] for report in reports if "error" in report]
        if errors:
            shutil.rmtree(hidden, ignore_errors=True)
            raise CheckpointError(f"saving {folder} failed, nothing is left of it: {errors[0]}")
        body: dict[str, Any] = {"format": FORMAT, "step": step, "world": self.ranks.world}
        body.update(self.facts)
        body["files"] = {n: f for report in reports for n, f in report["files"].items()}
        sync(hidden)
        write_durably(hidden / "manifest.json", _manifest_text(body))
        if folder.exists():  # the damaged one that an earlier resume skipped
            folder.rename(self.root / f".{folder.name}.replaced")
        os.rename(hidden, folder)
        sync(self.root)
        self._prune(folder)

    def _prune(self, newest: Path) -> None:
        """Delete what is beyond `keep`, never the one just written; unname it first."""
        others = [folder for folder in self.folders() if folder != newest]
        doomed = [
            folder.rename(folder.with_name(f".{folder.name}.old"))
            for folder in others[self.keep - 1 :]
        ]
        for folder in [*doomed, *self.root.glob(".step_*.replaced")]:
            shutil.rmtree(folder)

    def folders(self) -> list[Path]:
        """Return the named checkpoints, highest step first."""
        if not self.root.is_dir():
            return []
        named = [path for path in self.root.iterdir() if _STEP.match(path.name) and path.is_dir()]
        return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)

    def newest(self) -> Path | None:
        """Return the newest verified checkpoint (None: there is none at all), on every rank.

        Raises:
            CheckpointError: if there are checkpoints but none verifies, or it is another run's.
        """
        found = self.ranks.on_main(self._find)
        return None if found is None else Path(found)

    def _find(self) -> str | None:
        folders = self.folders()
        damage = []
        for folder in folders:
            try:
                self.check_facts(folder, verify(folder))
            except Damaged as error:
                logger.warning("checkpoint %s is damaged (%s): skipped", folder, error)
                damage.append(f"{folder.name}: {error}")
                continue
            return str(folder)
        if damage:
            raise CheckpointError(
                f"no checkpoint in {self.root} verifies ({'; '.join(damage)}); "
                "restore one, or choose another output.dir to begin again"
            )
        return None

    def check_facts(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Refuse a sound checkpoint of another run.

        Raises:
            CheckpointError: if it was written under another configuration or data.
        """
        for fact, what in (("config", "run file"), ("data", "data")):
            if manifest.get(fact) != self.facts[fact]:
                raise CheckpointError(
                    f"{folder} was written under another {what} (fingerprint "
                    f"{str(manifest.get(fact))[:12]}, expected {self.facts[fact][:12]}); "
                    f"use the {what} it was written with, or another output.dir"
                )

    def choose(self, asked: Path | None) -> Path | None:
        """Return the checkpoint to continue from, the same on every rank (None: begin).

        Args:
            asked: `checkpoint.resume` when it is a path: a checkpoint, or a run or folder whose
                newest is meant. The run's own newest goes first when it is further along than an
                `asked` one from elsewhere, so that a command may be repeated after a kill.

        Raises:
            CheckpointError: if none verifies, or `asked` would rewind the run's own folder.
        """
        own = self.newest()
        if asked is None:
            return own
        given = Path(self.ranks.on_main(lambda: self._at(asked)))
        if own is None or int(own.name[5:]) <= int(given.name[5:]):
            return given
        if given.resolve().parent == self.root.resolve():
            raise CheckpointError(
                f"checkpoint.resume={asked} would go back before {own}; remove the newer "
                "checkpoints first, or choose another output.dir"
            )
        logger.warning("this run is further along than checkpoint.resume=%s: using %s", asked, own)
        return own

    def _at(self, path: Path) -> str:
        """Verify the checkpoint that a path means (rank 0)."""
        if not _STEP.match(path.name):
            root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            found = Checkpoints(root, self.ranks, keep=self.keep, facts=self.facts)._find()
            if found is None:
                raise CheckpointError(f"checkpoint.resume={path}: there is no checkpoint")
            return found
        try:
            self.check_facts(path, verify(path))
        except Damaged as error:
            raise CheckpointError(f"checkpoint.resume={path} is damaged: {error}") from error
        return str(path)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's counters of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_rng(folder: Path, rank: int) -> None:
    """Set this process's random generators as saved; a rank that is new keeps its own."""
    path = folder / f"rng-{rank:05d}.safetensors"
    if path.is_file():
        restore_rng(load_file(path))
