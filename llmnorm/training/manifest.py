"""What a checkpoint promises: which files it has, how large they are, and the SHA-256 of each.

The manifest is believed only byte for byte: it ends with the hash of itself, so that a flipped bit
is found in any file. The files follow from the number of ranks alone, so a name in a manifest never
leads anywhere: it is one of these or the folder is refused before anything else is opened.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmnorm.durable import sha256_of
from llmnorm.errors import CheckpointError, LlmNormError
from llmnorm.safe_files import read_json

FORMAT = 1
STEP = re.compile(r"^step_(\d{8,18})$")
_MOST_BYTES = 16 * 2**20
"""Of manifest.json and state.json; 10,000 ranks need 4 MB."""


class Damaged(Exception):  # noqa: N818 (says what the folder is, not that the program erred)
    """A checkpoint whose files are not what its manifest promises."""


def names_of(rank: int, world: int) -> tuple[str, str, str]:
    """Return the names of a rank's files: weights, optimizer, random states."""
    shard = f"{rank:05d}-of-{world:05d}.safetensors"
    return f"model-{shard}", f"optimizer-{shard}", f"rng-{rank:05d}.safetensors"


def manifest_text(body: dict[str, Any]) -> str:
    """Return the text of a manifest, which ends with the hash of the rest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every byte against it.

    Raises:
        Damaged: naming the first file that is missing, foreign, altered or cannot be read.
    """
    try:
        manifest = _read_manifest(folder)
        _check_names(folder, manifest)
        for name, entry in sorted(manifest["files"].items()):
            _check_file(folder / name, entry)
    except OSError as error:
        raise Damaged(f"cannot be read: {error}") from error
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        if folder.is_symlink() or path.is_symlink():
            raise Damaged(f"{folder.name} or its manifest.json is a symbolic link")
        manifest = read_json(path, _MOST_BYTES)
        manifest.pop("sha256")
        if path.read_bytes() != manifest_text(manifest).encode():
            raise Damaged("manifest.json does not match its own hash")
        if manifest["format"] != FORMAT:
            raise Damaged(f"format {manifest['format']!r:.20} is not {FORMAT}")
        step, world, files = (manifest[key] for key in ("step", "world", "files"))
        if not isinstance(world, int) or world < 1 or len(files) != 3 * world + 1:
            raise Damaged(f"manifest.json has {len(files)} files for {world!r:.20} ranks")
        if folder.name != f"step_{step:08d}":
            raise Damaged(f"manifest.json is of step {step}")
    except FileNotFoundError as error:
        raise Damaged("manifest.json is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged("manifest.json is not readable") from error
    return manifest


def _check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the names in the manifest and in the folder with those that there must be."""
    world, files = manifest["world"], manifest["files"]
    expected = {name for rank in range(world) for name in names_of(rank, world)} | {"state.json"}
    for name in sorted(set(files) - expected):
        raise Damaged(f"manifest.json names {name!r:.80}, no file of a checkpoint")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(present - expected - {"manifest.json"}):
        raise Damaged(f"{name!r:.80} is not in the manifest")
    for name in sorted(expected):
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise Damaged(f"{name} is missing")


def _check_file(path: Path, entry: Any) -> None:
    size, digest = (entry.get(key) for key in ("size", "sha256")) if entry else (None, None)
    seen = path.stat().st_size
    if seen != size:
        raise Damaged(f"{path.name} has {seen} bytes, expected {size!r:.20}")
    if sha256_of(path) != digest:
        raise Damaged(f"{path.name} does not match its SHA-256")


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Say in one line when a verified checkpoint holds what no run writes.

    Raises:
        CheckpointError: instead of the errors of those who looked for something else in it.
    """
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, LlmNormError):
            raise
        raise CheckpointError(
            f"{folder} holds what no run writes ({error!r:.80}); "
            "remove this checkpoint to continue from the one before"
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's counters of a verified checkpoint.

    Raises:
        CheckpointError: if state.json is too large or holds no counters.
    """
    try:
        state = read_json(folder / "state.json", _MOST_BYTES)
        if state["step"] != int(folder.name[5:]):
            raise ValueError(f"step {state['step']!r:.20}, expected that of its folder")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'} was not written by a run ({error}); "
            "remove this checkpoint to continue from the one before"
        ) from error
    return state
