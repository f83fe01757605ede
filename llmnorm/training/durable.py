"""Files that survive a kill or a power cut: written whole, synced, then named.

A rename is only durable once the folder that holds the name is synced, and a file's bytes only
once the file is; every function here does both where its name says so.
"""

import hashlib
import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Force the bytes of `path` to the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Force the names in folder `path` to the disk."""
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
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def follow_umask(path: Path) -> None:
    """Give a file the permissions that the user's other files get (safetensors writes 0600)."""
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
