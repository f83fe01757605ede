"""Rows of an `.npy` file by position, from a file that must not change while it is in use.

Plain reads, no memory map: under a map a file that is cut off kills the process (SIGBUS), here it
is a `DataError`. Every read looks at the file's size and time of change afterwards, so that rows
of another content are never taken for those that were verified. `prepared.py` is the user.
"""

import os
import resource
import stat
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from .manifest import FileEntry

_MOST_OPEN_FILES = 256


class Stamp(NamedTuple):
    """What tells that a file was written to: size in bytes and time of change."""

    size: int
    changed_ns: int


def stamp_of(descriptor: int) -> Stamp:
    """The stamp of an open file as it is now."""
    found = os.fstat(descriptor)
    return Stamp(found.st_size, found.st_mtime_ns)


class OpenFiles:
    """File descriptors by path; the one unused for longest is closed where there are many."""

    def __init__(self) -> None:
        self._most = min(_MOST_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor of `path`, valid until the next call."""
        if path not in self._open:
            if len(self._open) >= max(self._most, 1):
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class ArrayFile:
    """An `.npy` file of a prepared folder.

    Args:
        folder: the prepared folder.
        entry: what the manifest says of the file.
        dtype: of its elements.
        shape: (rows,) or (rows, columns).
        files: where it is kept open.
        stamp: of the file when another process opened it; None takes it as it is.

    Raises:
        DataError: it is not that file.
    """

    def __init__(
        self,
        folder: Path,
        entry: FileEntry,
        dtype: np.dtype,
        shape: tuple[int, ...],
        *,
        files: OpenFiles,
        stamp: Stamp | None = None,
    ) -> None:
        check_size(folder, entry)
        self.path, self.bytes = folder / entry.name, entry.bytes
        self.dtype, self.shape = dtype, shape
        self._files = files
        self._first_byte = self._read_header()
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if self._first_byte + shape[0] * self._row_bytes != self.bytes:
            raise DataError(
                f"{self.path}: its {self.bytes} bytes are not the {self._first_byte} of a header "
                f"and {shape[0]} rows of {self._row_bytes}; it belongs to other data"
            )
        self.stamp = stamp or stamp_of(files.descriptor(self.path))

    def rows(self, begin: int, count: int) -> np.ndarray:
        """Rows ``begin .. begin + count``, which must exist; read-only.

        Raises:
            DataError: the file was written to or cut off since it was opened, or cannot be read.
        """
        assert 0 <= begin <= begin + count <= self.shape[0]
        size = count * self._row_bytes
        try:
            descriptor = self._files.descriptor(self.path)
            data = os.pread(descriptor, size, self._first_byte + begin * self._row_bytes)
            now = stamp_of(descriptor)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        if now.size != self.bytes:
            raise _wrong_size(self.path, now.size, self.bytes)
        if now != self.stamp or len(data) != size:
            raise DataError(
                f"{self.path} was written to while in use, so row {begin} may be of other data; "
                "start again: every file is then verified"
            )
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _read_header(self) -> int:
        """Check type and shape in the header; the number of bytes before the first row."""
        try:
            with self.path.open("rb") as stream:
                version = np.lib.format.read_magic(stream)
                if version != (1, 0):
                    raise ValueError(f"version {version}")
                shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
                first_byte = stream.tell()
        except Exception as error:  # of many kinds: file system, header's syntax, numpy
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.path}: not a readable .npy file: {reason}") from None
        if dtype != self.dtype or shape != self.shape or by_columns:
            raise DataError(
                f"{self.path} holds {dtype}{list(shape)}, the manifest says "
                f"{self.dtype}{list(self.shape)}; it belongs to other data"
            )
        return first_byte


def check_size(folder: Path, entry: FileEntry) -> None:
    """Raise a `DataError` unless a file of the manifest is there with its size."""
    path = folder / entry.name
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it or prepare the data again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(
            f"{path} is not a regular file ({stat.filemode(found.st_mode)}); restore it or prepare "
            "the data again"
        )
    if found.st_size != entry.bytes:
        raise _wrong_size(path, found.st_size, entry.bytes)


def _wrong_size(path: Path, size: int, expected: int) -> DataError:
    what = f"ends at byte {size}" if size < expected else f"has {size} bytes"
    return DataError(
        f"{path} {what}, the manifest says {expected} bytes; restore it or prepare again"
    )
