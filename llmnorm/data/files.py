"""Input files: found in a fixed order, hashed once, read plain or through gzip, xz or zstandard.

Every failure to read becomes a `DataError` that names the file and the byte. `sources.py` builds
documents from the lines found here.
"""

import gzip
import hashlib
import io
import logging
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError, EnvironmentProblem
from .manifest import hash_files

_READ_BLOCK = 1 << 20  # bytes
_LARGE_INPUT = 1 << 30  # bytes; hashing takes seconds from here on
_ZSTD_BLOCK = 1 << 13  # bytes decompressed at once; a frame of one repeated byte is 32,000 times it
# Text shrinks to a tenth; what grows a hundredfold and more when it is unpacked is made to.
_MOST_GROWTH = 250
_GROWTH_FROM = 1 << 26  # bytes of text before that is judged

logger = logging.getLogger(__name__)


def list_files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """A file itself, or a folder's files that match a pattern, sorted by relative path.

    Raises:
        DataError: the path is missing or not a regular file, or nothing matches.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a file or a folder")
    if not path.is_dir():
        return [_regular(path)]
    found = {
        file for pattern in patterns for file in path.rglob(pattern) if not _hidden(file, path)
    }
    files = sorted((file for file in found if not file.is_dir()), key=lambda f: f.as_posix())
    if not files:
        raise DataError(f"{path} holds no file named {' or '.join(patterns)}; see --glob")
    return [_regular(file) for file in files]


def _regular(file: Path) -> Path:
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size >= _LARGE_INPUT:
            _refuse_hole(file, status.st_size)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        what = stat.filemode(status.st_mode)
        raise DataError(f"{file} is not a regular file ({what}); give a file")
    return file


def _refuse_hole(file: Path, size: int) -> None:
    """Refuse a large file with a hole: it claims bytes that were never written."""
    if not hasattr(os, "SEEK_HOLE"):
        return
    with file.open("rb", buffering=0) as raw:
        hole = raw.seek(0, os.SEEK_HOLE)
    if hole < size:
        raise DataError(
            f"{file} has {size} bytes but a hole at byte {hole}, where nothing was written; "
            "it is an incomplete copy, restore it"
        )


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def files_identity(files: list[Path], root: Path) -> dict[str, Any]:
    """Count, bytes and one SHA-256 over relative names and contents, so that change is noticed."""
    base = root if root.is_dir() else root.parent
    size = sum(file.stat().st_size for file in files)
    if size >= _LARGE_INPUT:
        logger.info("hashing the input: %d files, %.1f GB", len(files), size / 1e9)
    lines = sorted(
        f"{sha256}  {file.relative_to(base).as_posix()}\n"
        for file, sha256 in zip(files, hash_files(files), strict=True)
    )
    return {
        "name": root.resolve().name,
        "files": len(files),
        "bytes": size,
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


@contextmanager
def opened(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The decompressed stream of an open file, chosen by the ending of its name."""
    if name.endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif name.endswith(".xz"):
        stream = cast(BinaryIO, lzma.LZMAFile(raw))  # noqa: SIM115 (closed below)
    elif name.endswith((".zst", ".zstd")):
        stream = cast(BinaryIO, _ZstdStream(raw))
    else:
        stream = raw
    if stream is not raw:
        stream = cast(BinaryIO, io.BufferedReader(_Bounded(stream, raw), _READ_BLOCK))
    try:
        yield stream
    finally:
        if stream is not raw:
            stream.close()


def lines(raw: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of an open file with their start, in bytes of decompressed text.

    A UTF-8 byte order mark at the start is left out.

    Raises:
        DataError: the compressed data is damaged or ends too early, or the disk fails.
    """
    offset = 0
    try:
        with opened(raw, path.name) as stream:
            for line in stream:
                start, offset = offset, offset + len(line)
                if start == 0 and line.startswith(b"\xef\xbb\xbf"):
                    start, line = 3, line[3:]
                yield start, line
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: compressed data is damaged or cut off after {offset} bytes of text "
            f"(byte {raw.tell()} of the file): {error}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read at byte {offset}: {error}") from None


def decoded(data: bytes, path: Path, start: int) -> str:
    """UTF-8 bytes as text; `start` is where they begin in the file.

    Raises:
        DataError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {start + error.start} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from None


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends in an error when it grows as no text does."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO) -> None:
        self._stream, self._raw, self._count = stream, raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), _READ_BLOCK))
        self._count += len(data)
        if self._count > max(_GROWTH_FROM, _MOST_GROWTH * self._raw.tell()):
            raise lzma.LZMAError(f"more than {_MOST_GROWTH} times its size; no text is so even")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """Read zstandard frames, and notice when the last one is cut off (its own reader does not)."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise EnvironmentProblem(
                "reading .zst files needs the package zstandard: pip install 'llmnorm[zstd]'"
            ) from None
        self._raw = raw
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._started = False  # inside a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._raw.read(_ZSTD_BLOCK)
            if self._frame.eof:
                self._frame, self._started = self._new_frame(), False
            if not data:
                if self._started:
                    raise EOFError("the last zstandard frame is incomplete")
                return 0
            self._started = True
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise lzma.LZMAError(f"zstandard: {error}") from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
