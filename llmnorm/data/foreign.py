"""Tokens that other tools made: nanoGPT and llm.c `.bin`, Megatron `.bin`/`.idx`, OLMo `.npy`.

Documents are what stands between end-of-text tokens, whether the tool put these before or after
a document. Text is not there, so a document's bytes are those of its decoding.
Files whose names say train and val (or valid, validation) keep that split.
"""

import itertools
import os
import re
import struct
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import DataError
from .files import files_identity
from .reading import stamp_of
from .sources import Document, FileSource
from .tokenizer import check_ids

_CHUNK = 1 << 20  # tokens looked at together
_VALIDATION = frozenset(("val", "valid", "validation"))
# llm.c's header is 256 int32: magic, version, number of tokens (dev/data/data_common.py).
_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
# Megatron's index (megatron/core/datasets/indexed_dataset.py): magic, version, dtype code, counts.
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}


class TokenSource(FileSource):
    """Documents of token ids from files.

    Args:
        path: file or folder.
        pattern: which files of a folder.
        eos_token_id: what separates documents.
        vocab_size: ids from here on are errors.
        dtype: of raw files; None is uint16, or uint32 when the vocabulary needs it.
    """

    tokenized = True

    def __init__(
        self,
        path: Path,
        pattern: str | None = None,
        *,
        eos_token_id: int,
        vocab_size: int,
        dtype: str | None = None,
    ) -> None:
        super().__init__(path, pattern)
        self.eos_token_id, self.vocab_size = eos_token_id, vocab_size
        name = dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")
        self.dtype = np.dtype(name).newbyteorder("<")
        splits = [_named_split(file) for file in self.files]
        self._splits = splits if {"train", "val"} == set(splits) else [None] * len(splits)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "dtype": self.dtype.name}

    def read(self, file: Path, raw: BinaryIO) -> Iterator[Document]:
        split = self._splits[self.files.index(file)]
        for stretch in self.sequences(file):
            if _too_narrow(stretch.dtype, self.vocab_size):
                raise DataError(
                    f"{file} holds {stretch.dtype.name}, which cannot number the vocabulary of "
                    f"{self.vocab_size}: larger ids were cut down, or the tokenizer is another"
                )
            for start, ids in self._documents(_Reader(file, raw, stretch)):
                yield Document(ids, split)
                raw.seek(stretch.first_byte + (start + len(ids)) * stretch.dtype.itemsize)

    @abstractmethod
    def sequences(self, file: Path) -> Iterator["Stretch"]:
        """The stretches of a file that begin and end with a document."""

    def _documents(self, tokens: "_Reader") -> Iterator[tuple[int, np.ndarray]]:
        """Number of the first token, and ids, of each document."""
        count = tokens.stretch.length
        if not count:
            yield 0, np.zeros(0, dtype=np.uint32)
        begin = 0
        for chunk_start in range(0, count, _CHUNK):
            chunk = tokens.read(chunk_start, min(chunk_start + _CHUNK, count))
            byte = tokens.byte(chunk_start)
            check_ids(chunk, self.vocab_size, f"{tokens.file} from byte {byte}")
            for end in (np.flatnonzero(chunk == self.eos_token_id) + chunk_start).tolist():
                yield begin, tokens.read(begin, end).astype(np.uint32)
                begin = end + 1
        if begin < count:
            yield begin, tokens.read(begin, count).astype(np.uint32)


class Stretch(NamedTuple):
    """Consecutive token ids in a file."""

    first_byte: int
    dtype: np.dtype
    length: int

    def part(self, begin: int, end: int) -> "Stretch":
        """Tokens ``begin .. end`` of it."""
        return Stretch(
            self.first_byte + begin * self.dtype.itemsize, self.dtype, max(end - begin, 0)
        )


class _Reader:
    """Plain reads of a stretch: a file cut off under a memory map would kill the process."""

    def __init__(self, file: Path, raw: BinaryIO, stretch: Stretch) -> None:
        self.file, self.raw, self.stretch = file, raw, stretch

    def byte(self, token: int) -> int:
        return self.stretch.first_byte + token * self.stretch.dtype.itemsize

    def read(self, begin: int, end: int) -> np.ndarray:
        size = (end - begin) * self.stretch.dtype.itemsize
        data = os.pread(self.raw.fileno(), size, self.byte(begin))
        if len(data) != size:
            ends = stamp_of(self.raw.fileno()).size
            raise DataError(f"{self.file} ends at byte {ends}; it was cut off while it was read")
        return np.frombuffer(data, self.stretch.dtype)


def _too_narrow(dtype: np.dtype, vocab_size: int) -> bool:
    return vocab_size - 1 > int(np.iinfo(dtype).max)


class RawTokens(TokenSource):
    """One array of ids a file, without or with a header that is recognized."""

    def sequences(self, file: Path) -> Iterator[Stretch]:
        stretch = self._stretch(file)
        with file.open("rb") as raw:
            begins = stretch.length and _Reader(file, raw, stretch).read(0, 1)[0]
        leading = bool(stretch.length) and int(begins) == self.eos_token_id  # before documents
        yield stretch.part(int(leading), stretch.length)

    def _stretch(self, file: Path) -> Stretch:
        with file.open("rb") as raw:
            head = raw.read(16)
        magic = int.from_bytes(head[:4], "little")
        if head.startswith(b"\x93NUMPY"):
            return _read_npy(file)
        if len(head) >= 12 and magic in _LLMC_DTYPES:
            dtype = _LLMC_DTYPES[magic]
            count = int.from_bytes(head[8:12], "little")
            return _stretch(file, _LLMC_HEADER_BYTES, dtype, count)
        stretch = _stretch(file, 0, self.dtype, None)
        if self.dtype.itemsize == 2 and stretch.length >= 64:
            with file.open("rb") as raw:
                first = _Reader(file, raw, stretch).read(0, min(stretch.length, _CHUNK))
            if not first[1::2].any():
                raise DataError(
                    f"{file}: every second 16-bit number from byte 2 on is 0, so these are 32-bit "
                    "tokens; pass --token-dtype uint32"
                )
        return stretch


class NanoGpt(RawTokens):
    """nanoGPT's `train.bin` and `val.bin` (bare uint16) and llm.c's, which have a header."""

    kind = "nanogpt"
    patterns = ("*.bin",)


class Olmo(RawTokens):
    """OLMo's `.npy`, which are bare numbers in spite of the name; real `.npy` are read too."""

    kind = "olmo"
    patterns = ("*.npy",)


class Megatron(TokenSource):
    """Megatron's indexed datasets: `NAME.bin` holds the ids, `NAME.idx` the documents."""

    kind = "megatron"
    patterns = ("*.bin",)

    def __init__(self, path: Path, pattern: str | None = None, **options: Any) -> None:
        if not path.exists() or path.suffix == ".idx":  # Megatron itself names the pair by prefix
            path = path.with_suffix("") if path.suffix == ".idx" else path
            path = path.with_name(path.name + ".bin")
        super().__init__(path, pattern, **options)

    def identity(self) -> dict[str, Any]:
        pairs = [part for file in self.files for part in (file, file.with_suffix(".idx"))]
        for file in pairs:
            if not file.is_file():
                raise DataError(f"{file} is missing; Megatron data is a pair of .bin and .idx")
        return {"kind": self.kind, **files_identity(pairs, self.path)}

    def sequences(self, file: Path) -> Iterator[Stretch]:
        index = file.with_suffix(".idx")
        dtype, ends, documents = _read_index(index)
        tokens = _stretch(file, 0, dtype, None)
        if ends[-1] != tokens.length:
            raise DataError(
                f"{file} ends at byte {file.stat().st_size}, but {index} describes "
                f"{int(ends[-1]) * dtype.itemsize}; the pair does not match"
            )
        borders = ends[documents].tolist()
        yield from (tokens.part(begin, end) for begin, end in itertools.pairwise(borders))


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Token type; tokens before each sequence and in all (sequences + 1,); document borders."""
    data = index.read_bytes()
    if len(data) < _MEGATRON_HEADER.size or not data.startswith(_MEGATRON_MAGIC):
        raise DataError(f"{index}: byte 0 is not the start of a Megatron index; expected MMIDIDX")
    _, version, code, sequences, borders = _MEGATRON_HEADER.unpack_from(data)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(f"{index}: version {version}, token type {code} (byte 9) are unknown")
    dtype, offset = _MEGATRON_DTYPES[code], _MEGATRON_HEADER.size
    needed = offset + 12 * sequences + 8 * borders
    if len(data) != needed:
        raise DataError(f"{index} ends at byte {len(data)}, its header promises {needed}")
    lengths = np.frombuffer(data, "<i4", sequences, offset).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, offset + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, offset + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise DataError(
            f"{index}: its sequences do not lie one after another (lengths from byte {offset}); it "
            "is damaged"
        )
    whole = borders > 0 and documents[0] == 0 and documents[-1] == sequences
    if not whole or (np.diff(documents) < 0).any():
        raise DataError(
            f"{index}: document borders (from byte {offset + 12 * sequences}) do not go from 0 to "
            f"its {sequences} sequences; it is damaged"
        )
    return dtype, ends, documents


def _stretch(file: Path, offset: int, dtype: np.dtype, count: int | None) -> Stretch:
    """The ids from byte ``offset`` to the file's end, which must be ``count``."""
    size = file.stat().st_size - offset
    if count is None and size % dtype.itemsize:
        raise DataError(
            f"{file}: {size} bytes are no whole number of {dtype.name} tokens; it is cut off at "
            f"byte {offset + size}, or see --token-dtype"
        )
    if count is not None and size != count * dtype.itemsize:
        raise DataError(
            f"{file} has {size} bytes of tokens after byte {offset}, its header promises "
            f"{count * dtype.itemsize}; the file is cut off or damaged"
        )
    return Stretch(offset, dtype, size // dtype.itemsize)


def _read_npy(file: Path) -> Stretch:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of many kinds: file system, header's syntax, numpy
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: not a readable .npy file: {reason}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(
            f"{file} holds {tokens.dtype}{list(tokens.shape)}; expected one row of integers"
        )
    return _stretch(file, tokens.offset, tokens.dtype, len(tokens))


def _named_split(file: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", file.stem.lower()))
    if "train" in words:
        return "train"
    return "val" if words & _VALIDATION else None
