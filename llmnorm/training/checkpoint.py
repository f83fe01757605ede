"""Checkpoints: which there are, which to continue from, and what they hold.

    checkpoints/step_00001000/
        model-RRRRR-of-NNNNN.safetensors       pieces of the weights, one file a rank
        optimizer-RRRRR-of-NNNNN.safetensors   pieces of the optimizer's state
        rng-RRRRR.safetensors                  random states
        state.json                             counters of the loop
        manifest.json                          size and SHA-256 of every file, written last

A checkpoint is whole or absent (`saving.py`) and believed only byte for byte (`manifest.py`). Which
one is newest is read from the folders, never from a pointer.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from llmnorm.errors import CheckpointError
from llmnorm.safe_files import check_safetensors
from llmnorm.training.manifest import STEP, Damaged, verify
from llmnorm.training.ranks import Ranks
from llmnorm.training.rng import restore_rng

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        root: the folder `checkpoints` of the run directory.
        ranks: the processes of the run; all call every method together.
        facts: what a resumed run must share (`config`, `data`) and what may differ (`engine`).
    """

    def __init__(self, root: Path, ranks: Ranks, *, facts: dict[str, str]) -> None:
        self.root = root
        self.ranks = ranks
        self.facts = facts

    def folders(self) -> list[Path]:
        """Return the named checkpoints, highest step first."""
        if not self.root.is_dir():
            return []
        named = [path for path in self.root.iterdir() if STEP.match(path.name) and path.is_dir()]
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
                f"no checkpoint in {self.root} verifies, of {len(damage)} ({damage[0]}); "
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
        path = path.resolve()
        if not STEP.match(path.name):
            root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            found = Checkpoints(root, self.ranks, facts=self.facts)._find()
            if found is None:
                raise CheckpointError(f"checkpoint.resume={path}: there is no checkpoint")
            return found
        try:
            self.check_facts(path, verify(path))
        except Damaged as error:
            raise CheckpointError(f"checkpoint.resume={path} is damaged: {error}") from error
        return str(path)


def read_rng(folder: Path, rank: int) -> None:
    """Set this process's random generators as saved; a rank that is new keeps its own.

    Raises:
        CheckpointError: if the file holds no such states.
    """
    path = folder / f"rng-{rank:05d}.safetensors"
    if not path.is_file():
        return
    try:
        check_safetensors(path)
        restore_rng(load_file(path))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no random states of a run ({error!r:.100}); "
            "remove this checkpoint to continue from the one before"
        ) from error
