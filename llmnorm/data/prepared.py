"""Reading a prepared folder: memory-mapped, verified on opening.

Token stream of a split: every document is end-of-text + its tokens, documents one after another,
shards one after another. `batches.py` cuts it into samples.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from .manifest import (
    FileEntry,
    Manifest,
    ShardEntry,
    SplitEntry,
    SplitName,
    hash_files,
    read_manifest,
)
from .tokenizer import check_ids, saved_tokenizer


def open_prepared(path: str | Path, verify: bool = True) -> "Prepared":
    """Open a prepared folder.

    Args:
        path: folder made by `llmnorm data prepare`.
        verify: compare every file's SHA-256 with the manifest, not only its size and header.

    Raises:
        DataError: anything is missing, damaged, cut off, or does not belong to the folder.
    """
    try:
        return Prepared(Path(path), verify)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


class Prepared:
    """A prepared folder: tokenizer, manifest and two splits. Made by `open_prepared`."""

    def __init__(self, path: Path, verify: bool) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self.vocab_size: int = self.manifest.tokenizer.vocab_size
        self.eos_token_id: int = self.manifest.tokenizer.eos_token_id
        self.fingerprint: str = self.manifest.fingerprint
        self._check_files(verify)
        self._splits = {
            name: Split(path, name, entry, self.manifest)
            for name, entry in self.manifest.splits.items()
        }

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the tokens were made with."""
        return saved_tokenizer(self.path)

    def split(self, name: SplitName) -> "Split":
        """The split ``train`` or ``val``.

        Raises:
            DataError: there is no such split.
        """
        if name not in self._splits:
            raise DataError(
                f"{self.path} has no split {name!r} (it has: {', '.join(self._splits)})"
            )
        return self._splits[name]

    def _check_files(self, verify: bool) -> None:
        entries = self.manifest.files
        for entry in entries:
            _check_size(self.path, entry)
        known = {entry.name for entry in entries}
        for file in sorted(self.path.glob("*/*.npy")):
            if (name := file.relative_to(self.path).as_posix()) not in known:
                raise DataError(
                    f"{file}: {name} is not in the manifest; a foreign shard, remove it"
                )
        if verify:
            hashes = hash_files([self.path / entry.name for entry in entries])
            for entry, sha256 in zip(entries, hashes, strict=True):
                if sha256 != entry.sha256:
                    raise DataError(
                        f"{self.path / entry.name}: SHA-256 is {sha256[:12]}, the manifest says "
                        f"{entry.sha256[:12]}; the file is damaged or of other data, restore it or "
                        "prepare again"
                    )


def _check_size(folder: Path, entry: FileEntry) -> None:
    file = folder / entry.name
    if not file.is_file():
        raise DataError(f"{file} is missing; restore it or prepare the data again")
    if (size := file.stat().st_size) != entry.bytes:
        what = f"ends at byte {size}" if size < entry.bytes else f"has {size} bytes"
        raise DataError(
            f"{file} {what}, the manifest says {entry.bytes} bytes; restore it or prepare again"
        )


class Split:
    """One split as one long token stream.

    Attributes:
        tokens, documents, utf8_bytes: totals; tokens count one end-of-text per document.
    """

    def __init__(self, folder: Path, name: str, entry: SplitEntry, manifest: Manifest) -> None:
        self.path = folder / name
        self.name = name
        self.tokens, self.documents = entry.tokens, entry.documents
        self.utf8_bytes = entry.utf8_bytes
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eos_token_id = manifest.tokenizer.eos_token_id
        self._folder, self._entry, self._manifest = folder, entry, manifest
        self._entries = entry.shards
        dtype = np.dtype(manifest.dtype)
        self._shards = [_map(folder, s.tokens_file, dtype, (s.tokens,)) for s in entry.shards]
        self._docs = [
            _map(folder, s.docs_file, np.dtype("<i8"), (s.documents, 2)) for s in entry.shards
        ]
        # (shards + 1,) positions in the split where shards begin, in tokens and in documents
        self._starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])
        self._doc_starts = np.cumsum([0, *(shard.documents for shard in entry.shards)])
        if (self._starts[-1], self._doc_starts[-1]) != (self.tokens, self.documents):
            raise DataError(f"{self.path}: shards do not add up to the manifest's totals")

    def __reduce__(self) -> tuple[type["Split"], tuple[Path, str, SplitEntry, Manifest]]:
        """Opened again in another process, since a pickled memory map would be a copy of all."""
        return Split, (self._folder, self.name, self._entry, self._manifest)

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens ``start .. start + length`` of the stream, (length,) int64.

        Raises:
            DataError: outside the split, a file changed since opening, or an id is beyond the
                vocabulary.
        """
        if start < 0 or length < 0 or start + length > self.tokens:
            raise DataError(
                f"{self.path}: tokens {start} to {start + length} were asked for, "
                f"the split has {self.tokens}"
            )
        result = np.empty(length, dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length:
            begin = start + filled - int(self._starts[shard])
            part = self._read(shard, begin, length - filled)
            result[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return result

    def document(self, i: int) -> np.ndarray:
        """Document ``i`` with its leading end-of-text, (length,) int64."""
        shard, row = self._locate(i)
        docs = self._docs[shard]
        begin = int(docs[row, 0])
        last = row + 1 == len(docs)
        end = self._entries[shard].tokens if last else int(docs[row + 1, 0])
        return self.window(int(self._starts[shard]) + begin, end - begin)

    def document_bytes(self, i: int) -> int:
        """UTF-8 bytes of document ``i``'s text."""
        shard, row = self._locate(i)
        return int(self._docs[shard][row, 1])

    def documents_for_scoring(
        self, max_documents: int | None = None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """(tokens without end-of-text (length,) int64, UTF-8 bytes) of each document in order."""
        limit = self.documents if max_documents is None else max_documents
        for i in range(min(self.documents, limit)):
            yield self.document(i)[1:], self.document_bytes(i)

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.documents:
            raise IndexError(f"{self.path}: document {i} of {self.documents}")
        shard = int(np.searchsorted(self._doc_starts, i, side="right")) - 1
        return shard, i - int(self._doc_starts[shard])

    def _read(self, shard: int, begin: int, length: int) -> np.ndarray:
        entry: ShardEntry = self._entries[shard]
        # A file cut while mapped would kill the process on access (SIGBUS), so look first.
        _check_size(self._folder, entry.tokens_file)
        part = self._shards[shard][begin : begin + length]
        check_ids(part, self.vocab_size, f"{self._folder / entry.tokens_file.name} from {begin}")
        return part


def _map(folder: Path, entry: FileEntry, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    file = folder / entry.name
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a readable .npy file: {error}") from None
    if array.dtype != dtype or array.shape != shape:
        raise DataError(
            f"{file} holds {array.dtype}{list(array.shape)}, the manifest says "
            f"{dtype}{list(shape)}; it belongs to other data"
        )
    return array
