"""Look at a file that a stranger may have made before a library is let at it.

safetensors and JSON run no code, yet a header of 80 MB with a million names costs half a minute and
gigabytes, a document nested 5,000 deep ends the interpreter's stack, and a name with `../` leaves
the folder. All of that is refused here, cheaply, as a `ValueError` that says what was seen.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_JSON_BYTES = 64 * 2**20


def check_plain_file(path: Path) -> int:
    """Return the size of a regular file; a pipe, socket or device would hang or never end.

    Raises:
        ValueError: it is something else.
        OSError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file ({stat.filemode(status.st_mode)})")
    return status.st_size


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that a link leads out of its folder.

    A folder of the hub's cache (`.../snapshots/COMMIT`) holds links to the blobs beside it.

    Raises:
        ValueError: it lies elsewhere.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        inside = path.resolve().is_relative_to(root)
    except RuntimeError:  # a link that leads to itself
        inside = False
    if not inside:
        raise ValueError(f"{path} is a link that leads out of {folder}")


def check_name(name: object) -> str:
    """Return the name of a file in the same folder.

    Raises:
        ValueError: it could lead elsewhere (a separator, `..`), or is no name.
    """
    plain = isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable()
    if not plain or name in (".", "..") or "/" in str(name) or "\\" in str(name):
        raise ValueError(f"{name!r:.80} is not the name of a file in the same folder")
    return str(name)


def read_json(path: Path, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is larger than `most_bytes`, no JSON in UTF-8, or nested too deep to read.
        OSError: it cannot be read.
    """
    size = check_plain_file(path)
    if size > most_bytes:
        raise ValueError(f"{path} has {size} bytes; expected at most {most_bytes}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is JSON nested too deeply to read") from None


def check_safetensors(path: Path, most_tensors: int = MAX_TENSORS) -> None:
    """Refuse a safetensors file whose header is a bomb, before the library parses it.

    Raises:
        ValueError: the header is cut off, larger than 16 MiB, or names more than `most_tensors`.
        OSError: the file cannot be read.
    """
    size = check_plain_file(path)
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} ends within its header: {size} bytes, header {length}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES}")
        # Every tensor is an object, so braces bound their number without parsing; one more is the
        # header itself and one its metadata.
        braces = handle.read(length).count(b"{")
    if braces > most_tensors + 2:
        raise ValueError(f"{path} names about {braces - 2} tensors; expected <= {most_tensors}")


@contextmanager
def open_safetensors(
    path: Path, framework: str = "pt", most_tensors: int = MAX_TENSORS
) -> Iterator[Any]:
    """Open a safetensors file after `check_safetensors`; every failure to read is a ValueError.

    Raises:
        ValueError: the header is refused, or the file is damaged.
        OSError: the file cannot be read.
    """
    check_safetensors(path, most_tensors)
    try:
        with safe_open(os.fspath(path), framework) as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
