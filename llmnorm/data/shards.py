"""Writing token shards: `tokens-00000.npy` and `docs-00000.npy`, resumable at every commit.

A `.npy` header has a fixed length here, so a file is appended to and its count filled in last;
a commit is a length, and going back to it is a truncation. Reading is `prepared.py`'s part.
"""

import io
import os
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from .manifest import ShardEntry, file_entry
from .ragged import Ragged

HEADER_BYTES = 128  # numpy pads the header of an array below 10**21 rows to this length


class NpyAppender:
    """An `.npy` file that grows by rows; `rows` counts what was appended.

    Args:
        path: file to create, or to continue when ``rows`` is given.
        dtype: element type.
        columns: 1 for shape (rows,), more for (rows, columns).
        rows: length of the last commit; what follows it in the file is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype, columns: int = 1, rows: int = 0) -> None:
        self.path, self.dtype, self.columns, self.rows = path, dtype, columns, rows
        self._stream = path.open("r+b" if rows else "wb")
        if rows:
            self._stream.truncate(HEADER_BYTES + rows * columns * dtype.itemsize)
            self._stream.seek(0, os.SEEK_END)
        else:
            self._stream.write(self._header())

    def append(self, array: np.ndarray) -> None:
        """Add rows; ``array`` is (rows,) or (rows, columns)."""
        self._stream.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self.rows += len(array)

    def sync(self) -> None:
        """Put every appended row on the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Fill in the header's count, put the file on the disk and close it."""
        self._stream.seek(0)
        self._stream.write(self._header())
        self.sync()
        self._stream.close()

    def abandon(self) -> None:
        """Close without finishing: the last commit can be continued."""
        self._stream.close()

    def _header(self) -> bytes:
        shape = (self.rows,) if self.columns == 1 else (self.rows, self.columns)
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        )
        assert buffer.tell() == HEADER_BYTES
        return buffer.getvalue()


class SplitState(BaseModel):
    """What a commit remembers of a split: finished shards, and the open one's lengths."""

    shards: list[ShardEntry] = []
    tokens: int = 0  # in the open shard, as are the next two
    documents: int = 0
    utf8_bytes: int = 0


class SplitWriter:
    """Write one split's documents to shards of about ``shard_tokens`` tokens.

    A document is stored as end-of-text + its tokens and never crosses a shard's border, so a
    shard may be longer than asked by one document.

    Args:
        root: the folder being prepared; shards go to ``root/split``.
        split: "train" or "val".
        dtype: uint16 or uint32.
        shard_tokens: a shard that has reached this many tokens is closed.
        eos_token_id: what a document begins with.
        state: the last commit, to continue from it.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        eos_token_id: int,
        state: SplitState,
    ) -> None:
        self.root, self.split, self.dtype = root, split, dtype
        self.shard_tokens = shard_tokens
        self.state = state
        self.eos_token_id = eos_token_id
        self._tokens: NpyAppender | None = None
        self._docs: NpyAppender | None = None
        (root / split).mkdir(exist_ok=True)
        if state.documents:
            self._open()

    def add(self, documents: Ragged) -> None:
        """Store documents in order; token ids must be below the vocabulary's size."""
        stream, ends = documents.stored(self.eos_token_id, self.dtype)
        starts = ends - documents.lengths - 1
        first = 0
        while first < len(documents):
            room = self.shard_tokens - self.state.tokens + int(starts[first])
            last = min(int(np.searchsorted(ends, room)), len(ends) - 1)
            rows = slice(first, last + 1)
            self._append(
                stream[starts[first] : ends[last]],
                starts[rows] - starts[first],
                documents.utf8_bytes[rows],
            )
            first = last + 1

    def commit(self) -> SplitState:
        """Put everything on the disk and return what is needed to continue from here."""
        for appender in (self._tokens, self._docs):
            if appender is not None:
                appender.sync()
        return self.state

    def close(self) -> list[ShardEntry]:
        """Finish the open shard; the entries of all shards in order."""
        if self._tokens is not None:
            self._close_shard()
        return self.state.shards

    def abandon(self) -> None:
        """Close the files without finishing them."""
        for appender in (self._tokens, self._docs):
            if appender is not None:
                appender.abandon()

    def _append(self, stream: np.ndarray, starts: np.ndarray, utf8_bytes: np.ndarray) -> None:
        if self._tokens is None or self._docs is None:
            self._open()
        assert self._tokens is not None
        assert self._docs is not None
        self._docs.append(np.column_stack([starts + self._tokens.rows, utf8_bytes]))
        self._tokens.append(stream)
        self.state.tokens = self._tokens.rows
        self.state.documents = self._docs.rows
        self.state.utf8_bytes += int(utf8_bytes.sum())
        if self._tokens.rows >= self.shard_tokens:
            self._close_shard()

    def _open(self) -> None:
        number = len(self.state.shards)
        folder = self.root / self.split
        self._tokens = NpyAppender(
            folder / f"tokens-{number:05d}.npy", self.dtype, rows=self.state.tokens
        )
        self._docs = NpyAppender(
            folder / f"docs-{number:05d}.npy", np.dtype("<i8"), 2, rows=self.state.documents
        )

    def _close_shard(self) -> None:
        assert self._tokens is not None
        assert self._docs is not None
        self._tokens.close()
        self._docs.close()
        entry = ShardEntry(
            tokens=self.state.tokens,
            documents=self.state.documents,
            utf8_bytes=self.state.utf8_bytes,
            tokens_file=file_entry(self.root, f"{self.split}/{self._tokens.path.name}"),
            docs_file=file_entry(self.root, f"{self.split}/{self._docs.path.name}"),
        )
        self.state = SplitState(shards=[*self.state.shards, entry])
        self._tokens = self._docs = None
