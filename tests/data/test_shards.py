"""Shards hold whole documents and are ordinary .npy files, however the documents arrive."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.data.ragged import Ragged
from llmnorm.data.shards import NpyAppender, SplitState, SplitWriter

pytestmark = pytest.mark.fast
EOS = 9


def writer(root: Path, shard_tokens: int, state: SplitState | None = None) -> SplitWriter:
    return SplitWriter(
        root,
        "train",
        dtype=np.dtype("uint16"),
        shard_tokens=shard_tokens,
        eos_token_id=EOS,
        state=state or SplitState(),
    )


def ragged(lengths: list[int]) -> Ragged:
    values = np.arange(sum(lengths)) % 9
    return Ragged(values, np.array(lengths, dtype=np.int64), 3 * np.array(lengths, dtype=np.int64))


def naive(
    documents: list[np.ndarray], shard_tokens: int
) -> list[tuple[list[int], list[list[int]]]]:
    """Shards one document at a time: (tokens, rows of start and bytes)."""
    shards: list[tuple[list, list]] = []
    for ids in documents:
        if not shards or len(shards[-1][0]) >= shard_tokens:
            shards.append(([], []))
        tokens, rows = shards[-1]
        rows.append([len(tokens), 3 * len(ids)])
        tokens += [EOS, *ids.tolist()]
    return shards


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batches=st.lists(st.lists(st.integers(1, 12), max_size=8), max_size=5),
    shard_tokens=st.integers(1, 40),
    commit_after=st.integers(0, 5),
)
def test_shards_equal_those_of_one_document_at_a_time(
    batches: list[list[int]], shard_tokens: int, commit_after: int
) -> None:
    parts = [ragged(lengths) for lengths in batches]
    documents = [ids for p in parts for ids in np.split(p.values, np.cumsum(p.lengths))[:-1]]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first = writer(root, shard_tokens)
        for part in parts[:commit_after]:
            first.add(part)
        state = SplitState.model_validate_json(first.commit().model_dump_json())
        for part in parts[commit_after:]:  # work that is lost: never committed
            first.add(part)
        first.abandon()
        second = writer(root, shard_tokens, state)
        for part in parts[commit_after:]:
            second.add(part)
        entries = second.close()
        expected = naive(documents, shard_tokens)
        assert len(entries) == len(expected)
        for entry, (tokens, rows) in zip(entries, expected, strict=True):
            assert np.load(root / entry.tokens_file.name).tolist() == tokens
            assert np.load(root / entry.docs_file.name).tolist() == rows
            assert (entry.tokens, entry.documents) == (len(tokens), len(rows))
            assert entry.utf8_bytes == sum(size for _, size in rows)


def test_an_unfinished_file_is_cut_back_to_its_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    appender = NpyAppender(path, np.dtype("<i8"), 2)
    appender.append(np.array([[1, 2], [3, 4]]))
    appender.sync()
    appender.append(np.array([[5, 6]]))
    appender.abandon()
    again = NpyAppender(path, np.dtype("<i8"), 2, rows=2)
    again.append(np.array([[7, 8]]))
    again.close()
    assert np.load(path).tolist() == [[1, 2], [3, 4], [7, 8]]
