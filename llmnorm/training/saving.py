"""Saving while training goes on: copies in the main thread, files in the background.

A save is one story told with pauses (`Saver._tell`). At each pause a rank's own thread writes to
the disk; no thread talks to the other ranks. The loop adds `busy` up over the ranks with the sums
of each step; once no rank is busy, all go on with the story together. So a rank that cannot write
is heard by all, and none waits for a file of another.

The files go into a hidden folder, are forced to the disk, and get a manifest, then a name. Until a
newer one has its name, nothing older is deleted; what stays beside it has been read back once.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from llmnorm.durable import sync, write_durably, write_hashed
from llmnorm.errors import CheckpointError
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.manifest import FORMAT, Damaged, manifest_text, names_of, verify
from llmnorm.training.pieces import Piece, write_pieces
from llmnorm.training.rng import rng_tensors
from llmnorm.training.shards import write_tensors

logger = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3
"""A run stops after so many saves in a row that the disk refused."""
_SPARE_BYTES = 2**20
"""Room beside the pieces: headers, random states, manifest, and the metrics written meanwhile."""


def told(work: Callable[[], Any]) -> dict[str, Any]:
    """Do `work`; return {"value": its JSON result} or {"error": one line}, for all ranks."""
    try:
        return {"value": work()}
    except Exception as error:
        return {"error": str(error) if isinstance(error, OSError) else repr(error)}


class Background:
    """Work in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._outcome: dict[str, Any] = {}
        self._thread = Thread(target=self._run, args=(work,), name="llmnorm-save", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        self._outcome = told(work)

    @property
    def busy(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """Wait; return what `told` says of the work."""
        self._thread.join()
        return self._outcome


class Saver:
    """Writes the checkpoints of a run; all ranks call every method together.

    Args:
        checkpoints: where they stand.
        keep: how many to leave: the newest, and those before it that can be read back.
        overlap: go on training while the files are written, from a copy of the pieces in memory.
            The copy keeps its memory for the next save: to get it anew would take ten times as
            long as to copy.
    """

    def __init__(self, checkpoints: Checkpoints, *, keep: int, overlap: bool) -> None:
        self.checkpoints = checkpoints
        self.root = checkpoints.root
        self.ranks = checkpoints.ranks
        self.keep = max(1, keep)
        self.overlap = overlap
        self.failures = 0  # in a row
        self._copies: dict[str, Tensor] = {}
        self._story: Iterator[Background] = iter(())
        self._under_way: Background | None = None
        self._read_back: dict[str, bool] = {}  # whether a folder was as its manifest says

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._under_way is not None and self._under_way.busy

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        state: dict[str, Any],
        *,
        first: Callable[[], object] = lambda: None,
        last: bool = False,
    ) -> None:
        """Begin the checkpoint of `step` completed steps, after the one under way.

        Args:
            step: completed steps.
            pieces: what this rank owns of weights and optimizer.
            state: the loop's counters, JSON.
            first: what rank 0 must have on the disk before, such as the metrics of these steps.
            last: nothing follows: wait for it, and fail when it fails.

        Raises:
            CheckpointError: if the disk refused `MOST_FAILED_SAVES` in a row, or the `last` one;
                nothing of the attempt is left.
        """
        self.wait()
        overlap = self.overlap and not last
        if not overlap:
            self._copies.clear()
        self._story = self._tell(
            step,
            [self._copy(piece) if overlap else piece for piece in pieces],
            rng_tensors(),
            json.dumps(state, indent=1, sort_keys=True),
            first,
            last,
        )
        self.advance()
        if not overlap:
            self.wait()

    def _copy(self, piece: Piece) -> Piece:
        """Copy a piece into the memory of its last copy."""
        tensor, kept = piece.tensor.detach(), self._copies.get(piece.key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._copies[piece.key] = torch.empty_like(tensor, device="cpu")
        return replace(piece, tensor=kept.copy_(tensor))

    def advance(self) -> None:
        """Go on with the save under way, if any; no rank may be busy."""
        self._under_way = None
        self._under_way = next(self._story, None)

    def wait(self) -> None:
        """Wait until the save under way is a checkpoint.

        Raises:
            CheckpointError: as `save`.
        """
        while self._under_way is not None:
            self._under_way.result()
            self.advance()

    def close(self) -> None:
        """Leave no thread and nothing half written; with one process, finish the save under way."""
        if self._under_way is not None:
            self._under_way.result()
        if self.ranks.world == 1:
            with suppress(CheckpointError):  # the run ends for another reason
                self.wait()
        if self.ranks.is_main:
            with suppress(OSError):  # another rank may still write
                self._clear()

    def _tell(
        self,
        step: int,
        pieces: list[Piece],
        rng: dict[str, Tensor],
        state: str,
        first: Callable[[], object],
        last: bool,
    ) -> Iterator[Background]:
        """The story of a save, from an empty hidden folder to the checkpoint's name."""
        ranks, name = self.ranks, f"step_{step:08d}"
        folder, hidden = self.root / name, self.root / f".{name}.writing"
        (need,) = ranks.sums(sum(piece.tensor.nbytes for piece in pieces))
        opening = partial(self._open, folder, hidden, int(need), first)
        outcome = ranks.broadcast(told(opening) if ranks.is_main else None)
        if outcome.get("value") == "there":
            return
        if "error" not in outcome:
            writing = Background(partial(self._write_own, hidden, pieces, rng, state))
            yield writing
            reports = ranks.gather(writing.result())
            publish = partial(self._publish, hidden, folder, step, reports)
            publishing = Background(publish if ranks.is_main else lambda: None)
            yield publishing
            outcome = ranks.broadcast(publishing.result())
        ranks.on_main(partial(self._judge, folder, outcome.get("error"), last))

    def _open(self, folder: Path, hidden: Path, need: int, first: Callable[[], object]) -> str:
        """Make an empty hidden folder, after clearing what an earlier, killed save left."""
        self.root.mkdir(parents=True, exist_ok=True)
        first()
        if folder.exists() and self._is_sound(folder):
            return "there"  # a start that took no step
        self._clear()
        self._check_room(need)
        hidden.mkdir()
        return "opened"

    def _check_room(self, need: int) -> None:
        disk = shutil.disk_usage(self.root)
        if disk.total and disk.free < need + _SPARE_BYTES:
            raise OSError(
                f"{self.root} has {disk.free} bytes free, the checkpoint needs "
                f"{need + _SPARE_BYTES}"
            )

    def _write_own(
        self, hidden: Path, pieces: list[Piece], rng: dict[str, Tensor], state: str
    ) -> dict[str, Any]:
        """Write and sync this rank's files; return their sizes and hashes."""
        model, optimizer, random_states = names_of(self.ranks.rank, self.ranks.world)
        try:
            files = {
                model: write_pieces(hidden / model, (p for p in pieces if not p.slot)),
                optimizer: write_pieces(hidden / optimizer, (p for p in pieces if p.slot)),
                random_states: write_tensors(hidden / random_states, rng),
            }
            if self.ranks.is_main:
                files["state.json"] = write_hashed(hidden / "state.json", [state.encode()])
        except OSError as error:
            need, free = sum(p.tensor.nbytes for p in pieces), shutil.disk_usage(hidden).free
            raise OSError(
                f"{error} (rank {self.ranks.rank} writes {need} bytes, {free} are free)"
            ) from error
        return dict(files)

    def _publish(
        self, hidden: Path, folder: Path, step: int, reports: list[dict[str, Any]]
    ) -> None:
        """Give the hidden folder its manifest and its name (rank 0, when all have written)."""
        try:
            errors = [report["error"] for report in reports if "error" in report]
            if errors:
                raise OSError(errors[0])
            body: dict[str, Any] = {"format": FORMAT, "step": step, "world": self.ranks.world}
            body.update(self.checkpoints.facts)
            body["files"] = {n: f for report in reports for n, f in report["value"].items()}
            sync(hidden)
            write_durably(hidden / "manifest.json", manifest_text(body))
            if os.path.lexists(folder):  # a damaged one, which a resume skipped
                folder.rename(self.root / f".{folder.name}.replaced")
            hidden.rename(folder)
            sync(self.root)
        except Exception:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        self._read_back.pop(folder.name, None)
        self._prune(folder)

    def _prune(self, newest: Path) -> None:
        """Delete what is beyond `keep`; unname it first.

        Only what reads back counts as kept, so that damage to the newest never finds all of the
        older ones damaged too, or gone.
        """
        kept, doomed = 1, []
        for folder in self.checkpoints.folders():
            if kept >= self.keep and folder != newest:
                doomed.append(folder)
            elif folder != newest:
                kept += self._is_sound(folder)
        try:
            for folder in doomed:
                self._read_back.pop(folder.name, None)
                folder.rename(self.root / f".{folder.name}.old")
            self._clear()
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be deleted: %s", self.root, error)

    def _clear(self) -> None:
        """Delete what has no name yet, or no longer."""
        for left in self.root.glob(".step_*"):
            _remove(left)

    def _is_sound(self, folder: Path) -> bool:
        """Whether a checkpoint reads back; each is read once."""
        if folder.name not in self._read_back:
            try:
                self._read_back[folder.name] = bool(verify(folder))
            except Damaged as error:
                logger.warning("checkpoint %s is damaged (%s)", folder, error)
                self._read_back[folder.name] = False
        return self._read_back[folder.name]

    def _judge(self, folder: Path, error: str | None, last: bool) -> None:
        """Count a failed save (rank 0); say so, or stop the run."""
        self.failures = 0 if error is None else self.failures + 1
        if error is None:
            return
        if last or self.failures >= MOST_FAILED_SAVES:
            raise CheckpointError(
                f"saving {folder.name} failed ({self.failures} in a row), nothing is left of it: "
                f"{error}; make room, then start the run again to continue it"
            )
        logger.warning("saving %s failed, training goes on: %s", folder.name, error)


def _remove(path: Path) -> None:
    """Delete a folder, or a link that stands for one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)
