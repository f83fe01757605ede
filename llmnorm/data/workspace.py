"""The hidden folder in which a preparation grows until it is published in one rename.

`.NAME.partial/` stands beside the folder to be: `folder/` becomes it, `state.json` says what was
asked for and how far it has come. The state is replaced by rename after the data it speaks of is
on the disk, so a process killed at any instant leaves a state that can be continued.
"""

import fcntl
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ValidationError

from ..durable import sync, take_lock, write_durably
from ..errors import DataError
from .manifest import SplitName
from .shards import SplitState

logger = logging.getLogger(__name__)
SPLITS: tuple[SplitName, ...] = ("train", "val")


class Progress(BaseModel):
    """How far a preparation has come; `consumed` counts documents taken from the source."""

    tokenizer_files: list[str]
    consumed: int = 0
    skipped: int = 0  # documents without text or without tokens
    filled: int = 0  # documents with text
    tokens: int = 0
    full: bool = False  # the token budget is spent
    splits: dict[str, SplitState] = {split: SplitState() for split in SPLITS}


class _State(BaseModel):
    request: dict[str, Any]
    progress: Progress | None = None


class Workspace:
    """Hold the hidden folder for one process, as a context manager.

    Args:
        out: the folder to be; it must not exist, or be empty.
        request: what is asked for. A workspace begun for another request is refused.
        restart: throw away what an earlier, unfinished preparation left.

    Raises:
        DataError: another process is preparing the same folder, the unfinished work is for
            another request or damaged, or the place cannot be written.
    """

    def __init__(self, out: Path, request: dict[str, Any], restart: bool) -> None:
        self.out = out
        self.root = _root(out)
        self.folder = self.root / "folder"
        self.request = request
        self.restart = restart
        self._lock = -1

    def __enter__(self) -> "Workspace":
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.out} cannot be made: {error}") from None
        try:
            self._take_lock()
            self.progress = self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:
            logger.warning("what is done so far is kept; the same command continues from there")
        os.close(self._lock)

    def commit(self, progress: Progress) -> None:
        """Remember how far the preparation has come; the data must be on the disk already."""
        self._write_state(_State(request=self.request, progress=progress))

    def publish(self) -> None:
        """Put the folder on the disk and give it its name."""
        for path in sorted(self.folder.rglob("*")):
            sync(path)
        sync(self.folder)
        try:
            os.rename(self.folder, self.out.resolve())
        except OSError as error:
            raise DataError(f"{self.out} cannot take the finished folder: {error}") from None
        sync(self.out.resolve().parent)
        remove(self.root)

    def _begin(self) -> Progress | None:
        """Continue what is there, or begin; None when no tokenizer is ready yet."""
        if self.restart:
            remove(self.root / "state.json")
        state = self._read_state()
        if state is not None and state.progress is not None:
            if state.progress.consumed:
                advice = "pass --restart to drop what is there"
                refuse_other_request(self.root, state.request, self.request, advice)
                logger.info("continuing after %d documents", state.progress.consumed)
            if state.request == self.request:
                return state.progress
        remove(self.folder)
        self.folder.mkdir()
        self._write_state(_State(request=self.request))
        return None

    def _take_lock(self) -> None:
        if not take_lock(fcntl.flock, self._lock, self.root):
            raise DataError(
                f"{self.root} is in use by another process that prepares {self.out}; wait for it"
            )

    def _read_state(self) -> _State | None:
        path = self.root / "state.json"
        if not path.exists():
            return None
        try:
            return _State.model_validate_json(path.read_bytes())
        except ValidationError:
            raise DataError(
                f"{path} is damaged; pass --restart to prepare from the start"
            ) from None

    def _write_state(self, state: _State) -> None:
        write_durably(self.root / "state.json", state.model_dump_json())


def _root(out: Path) -> Path:
    place = out.resolve()
    return place.parent / f".{place.name}.partial"


def tidy_after_publishing(out: Path) -> None:
    """Remove what is left when a process was killed just after giving the folder its name."""
    if not (_root(out) / "folder").exists():
        remove(_root(out))


def refuse_other_request(
    folder: Path, old: dict[str, Any], new: dict[str, Any], advice: str
) -> None:
    """Raise a `DataError` naming the first difference between two requests."""
    flat_old, flat_new = _flat(old), _flat(new)
    for key in [*flat_new, *flat_old]:
        seen, asked = flat_old.get(key), flat_new.get(key)
        if seen != asked:
            raise DataError(
                f"{folder} was made with {key} = {_short(seen)}, now {_short(asked)} is asked for; "
                f"choose another --out, or {advice}"
            )


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}...'"


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
