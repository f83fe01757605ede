"""Reading a prepared folder, verified on opening.

Token stream of a split: every document is end-of-text + its tokens, documents one after another,
shards one after another. `batches.py` cuts it into samples.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..environment import is_out_of_memory
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
from .reading import ArrayFile, OpenFiles, Stamp, check_size
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
        """The tokenizer the tokens were made with.

        Raises:
            DataError: its files were removed or changed since the folder was opened.
        """
        entries = self.manifest.tokenizer.files
        try:
            for entry in entries:
                check_size(self.path, entry)
            _check_hashes(self.path, entries)
            return saved_tokenizer(self.path)
        except DataError:
            raise
        except Exception as error:  # of many kinds, from transformers, the parser, the file system
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise DataError(f"{self.path}: its tokenizer cannot be loaded: {reason:.160}") from None

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
            check_size(self.path, entry)
        known = {entry.name for entry in entries}
        for file in sorted(self.path.glob("*/*.npy")):
            if (name := file.relative_to(self.path).as_posix()) not in known:
                raise DataError(
                    f"{file}: {name} is not in the manifest; a foreign shard, remove it"
                )
        if verify:
            _check_hashes(self.path, entries)


def _check_hashes(folder: Path, entries: Sequence[FileEntry]) -> None:
    hashes = hash_files([folder / entry.name for entry in entries])
    for entry, sha256 in zip(entries, hashes, strict=True):
        if sha256 != entry.sha256:
            raise DataError(
                f"{folder / entry.name}: SHA-256 is {sha256[:12]}, the manifest says "
                f"{entry.sha256[:12]}; the file is damaged or of other data, restore it or "
                "prepare again"
            )


class Split:
    """One split as one long token stream.

    Attributes:
        tokens, documents, utf8_bytes: totals; tokens count one end-of-text per document.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        entry: SplitEntry,
        manifest: Manifest,
        stamps: Sequence[Stamp] | None = None,
    ) -> None:
        self.path = folder / name
        self.name = name
        self.tokens, self.documents = entry.tokens, entry.documents
        self.utf8_bytes = entry.utf8_bytes
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eos_token_id = manifest.tokenizer.eos_token_id
        self._arguments = folder, name, entry, manifest
        self._open_shards(folder, entry.shards, np.dtype(manifest.dtype), stamps)
        # (shards + 1,) positions in the split where shards begin, in tokens and in documents
        self._starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])
        self._doc_starts = np.cumsum([0, *(shard.documents for shard in entry.shards)])
        if (self._starts[-1], self._doc_starts[-1]) != (self.tokens, self.documents):
            raise DataError(f"{self.path}: shards do not add up to the manifest's totals")

    def _open_shards(
        self,
        folder: Path,
        shards: Sequence[ShardEntry],
        dtype: np.dtype,
        stamps: Sequence[Stamp] | None,
    ) -> None:
        files = OpenFiles()
        wanted: list[tuple[FileEntry, np.dtype, tuple[int, ...]]] = [
            *((shard.tokens_file, dtype, (shard.tokens,)) for shard in shards),
            *((shard.docs_file, np.dtype("<i8"), (shard.documents, 2)) for shard in shards),
        ]
        known: Sequence[Stamp | None] = stamps or [None] * len(wanted)
        arrays = [
            ArrayFile(folder, *what, files=files, stamp=stamp)
            for what, stamp in zip(wanted, known, strict=True)
        ]
        self._stamps = [array.stamp for array in arrays]
        self._shards, self._docs = arrays[: len(shards)], arrays[len(shards) :]

    def __reduce__(self) -> tuple[type["Split"], tuple[Any, ...]]:
        """Opened again in another process, where the files must still be the same."""
        return Split, (*self._arguments, self._stamps)

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
        docs, stored = self._docs[shard], self._shards[shard].shape[0]
        starts = docs.rows(row, min(2, docs.shape[0] - row))[:, 0].tolist()
        begin, end = (*starts, stored)[:2]
        if not 0 <= begin < end <= stored:
            raise DataError(
                f"{docs.path}: row {row} puts a document at tokens {begin} to {end} of {stored}; "
                "prepare the data again"
            )
        return self.window(int(self._starts[shard]) + begin, end - begin)

    def document_bytes(self, i: int) -> int:
        """UTF-8 bytes of document ``i``'s text."""
        shard, row = self._locate(i)
        return int(self._docs[shard].rows(row, 1)[0, 1])

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

    def _read(self, shard: int, begin: int, most: int) -> np.ndarray:
        tokens = self._shards[shard]
        part = tokens.rows(begin, min(most, tokens.shape[0] - begin))
        check_ids(part, self.vocab_size, f"{tokens.path} from {begin}")
        return part
