"""Tokens that other tools made: nanoGPT and llm.c `.bin`, Megatron `.bin`/`.idx`, OLMo `.npy`.

Documents are what stands between end-of-text tokens, whether the tool put these before or after
a document. Text is not there, so a document's bytes are those of its decoding.
Files whose names say train and val (or valid, validation) keep that split.
"""

import re
import struct
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from .files import files_identity
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
        for data_file, first_byte, tokens in self.sequences(file):
            for start, ids in self._documents(tokens, data_file, first_byte):
                yield Document(ids, split)
                raw.seek(first_byte + (start + len(ids)) * tokens.itemsize)  # progress

    @abstractmethod
    def sequences(self, file: Path) -> Iterator[tuple[Path, int, np.ndarray]]:
        """Stretches of tokens that begin and end with a document.

        Yields:
            the file they lie in, their first byte there, and the ids (length,), memory-mapped.
        """

    def _documents(
        self, tokens: np.ndarray, file: Path, first_byte: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not len(tokens):
            yield 0, np.zeros(0, dtype=np.uint32)
        begin = 0
        for chunk_start in range(0, len(tokens), _CHUNK):
            chunk = tokens[chunk_start : chunk_start + _CHUNK]
            byte = first_byte + chunk_start * tokens.itemsize
            check_ids(chunk, self.vocab_size, f"{file} from byte {byte}")
            for end in (np.flatnonzero(chunk == self.eos_token_id) + chunk_start).tolist():
                yield begin, np.array(tokens[begin:end], dtype=np.uint32)
                begin = end + 1
        if begin < len(tokens):
            yield begin, np.array(tokens[begin:], dtype=np.uint32)


class RawTokens(TokenSource):
    """One array of ids a file, without or with a header that is recognized."""

    def sequences(self, file: Path) -> Iterator[tuple[Path, int, np.ndarray]]:
        first_byte, tokens = self._tokens(file)
        if len(tokens) and int(tokens[0]) == self.eos_token_id:  # it comes before documents
            first_byte, tokens = first_byte + tokens.itemsize, tokens[1:]
        yield file, first_byte, tokens

    def _tokens(self, file: Path) -> tuple[int, np.ndarray]:
        with file.open("rb") as raw:
            head = raw.read(16)
        magic = int.from_bytes(head[:4], "little")
        if head.startswith(b"\x93NUMPY"):
            return _read_npy(file)
        if len(head) >= 12 and magic in _LLMC_DTYPES:
            dtype = _LLMC_DTYPES[magic]
            count = int.from_bytes(head[8:12], "little")
            return _LLMC_HEADER_BYTES, _mapped(file, _LLMC_HEADER_BYTES, dtype, count)
        tokens = _mapped(file, 0, self.dtype, None)
        if self.dtype.itemsize == 2 and len(tokens) >= 64 and not tokens[1:_CHUNK:2].any():
            raise DataError(
                f"{file}: every second 16-bit number from byte 2 on is 0, so these are 32-bit "
                "tokens; pass --token-dtype uint32"
            )
        return 0, tokens


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

    def sequences(self, file: Path) -> Iterator[tuple[Path, int, np.ndarray]]:
        index = file.with_suffix(".idx")
        dtype, lengths, pointers, documents = _read_index(index)
        tokens = _mapped(file, 0, dtype, None)
        ends = pointers + lengths * dtype.itemsize
        if len(ends) and (int(ends.max()) > tokens.nbytes or int(pointers.min()) < 0):
            worst = int(np.argmax(ends))
            raise DataError(
                f"{file} ends at byte {tokens.nbytes}, but {index} puts sequence {worst} at bytes "
                f"{int(pointers[worst])} to {int(ends[worst])}; the pair does not match"
            )
        for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
            begin = int(pointers[first]) if first < last else 0
            end = int(ends[last - 1]) if first < last else 0
            yield file, begin, tokens[begin // dtype.itemsize : end // dtype.itemsize]


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Token type, and per sequence its length in tokens and first byte; document borders."""
    data = index.read_bytes()
    if len(data) < _MEGATRON_HEADER.size or not data.startswith(_MEGATRON_MAGIC):
        raise DataError(f"{index}: byte 0 is not the start of a Megatron index; expected MMIDIDX")
    _, version, code, sequences, borders = _MEGATRON_HEADER.unpack_from(data)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(f"{index}: version {version}, token type {code} (byte 9) are unknown")
    needed = _MEGATRON_HEADER.size + 12 * sequences + 8 * borders
    if len(data) < needed:
        raise DataError(f"{index} ends at byte {len(data)}, its header promises {needed}")
    offset = _MEGATRON_HEADER.size
    lengths = np.frombuffer(data, "<i4", sequences, offset).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, offset + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, offset + 12 * sequences)
    if len(documents) and int(documents.max()) > sequences:
        raise DataError(f"{index}: document borders reach past its {sequences} sequences")
    return _MEGATRON_DTYPES[code], lengths, pointers, documents


def _mapped(file: Path, offset: int, dtype: np.dtype, count: int | None) -> np.ndarray:
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
    if not size:
        return np.zeros(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(size // dtype.itemsize,))


def _read_npy(file: Path) -> tuple[int, np.ndarray]:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a readable .npy file: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(
            f"{file} holds {tokens.dtype}{list(tokens.shape)}; expected one row of integers"
        )
    return file.stat().st_size - tokens.nbytes, tokens


def _named_split(file: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", file.stem.lower()))
    if "train" in words:
        return "train"
    return "val" if words & _VALIDATION else None
