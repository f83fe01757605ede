"""Files that survive a kill or a power cut: written whole, synced, then named; and their locks.

A rename is only durable once the folder that holds the name is synced, and a file's bytes only
once the file is; every function here does both where its name says so.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from fcntl import LOCK_EX, LOCK_NB
from io import FileIO
from pathlib import Path
from typing import TypedDict

logger = logging.getLogger(__name__)

_CHUNK = 2**24  # bytes written, then hashed, at a time


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a kill leaves the old or the new file, never a part."""
    hidden = path.with_name(f".{path.name}.writing")
    with open(hidden, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(hidden, path)
    sync(path.parent)


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    size: int
    sha256: str


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> FileFacts:
    """Write a new file, force it to the disk, and return the size and hash of what was given.

    Other threads run meanwhile: neither writing nor hashing holds Python's lock.

    Raises:
        OSError: naming the file, when the disk refuses.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "xb", buffering=0) as handle:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _CHUNK):
                    _write_all(handle, chunk := view[start : start + _CHUNK])
                    digest.update(chunk)
                size += len(view)
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"size": size, "sha256": digest.hexdigest()}


def _write_all(handle: FileIO, view: memoryview) -> None:
    """Write all of it; the system may take a part at a time."""
    while view:
        view = view[handle.write(view) :]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def follow_umask(path: Path) -> None:
    """Give a file the permissions that the user's other files get (safetensors writes 0600)."""
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def take_lock(lock: Callable[[int, int], object], descriptor: int, path: Path) -> bool:
    """Lock an open file against other processes; return False when another one holds the lock.

    A file system without locks gives a warning, and True.

    Args:
        lock: `fcntl.lockf` (belongs to this process alone) or `fcntl.flock` (children share it;
            works on folders).
        descriptor: of the file or folder to lock, held open as long as the lock.
        path: what is protected, for the warning.
    """
    try:
        lock(descriptor, LOCK_EX | LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        logger.warning("%s cannot be locked (%s): do not use it twice at once", path, error)
    return True
