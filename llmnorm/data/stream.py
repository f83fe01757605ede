"""The stream of a preparation: documents to splits to tokens to shards, committed on the way.

What ends up in the shards does not depend on the batches or on when a commit falls.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from .manifest import SplitName
from .options import PrepareOptions
from .progress import PrepareProgress
from .ragged import Ragged
from .shards import SplitWriter
from .sources import Document, Source
from .splitting import assign_splits
from .tokenizer import Encoder, check_ids
from .workspace import Progress, Workspace

_BATCH_SIZE = 1 << 19  # characters (or tokens of a tokenized source) in a batch
_BATCH_DOCUMENTS = 1 << 14
_BATCHES_AHEAD = 2
_COMMIT_SECONDS = 5.0


class _Batch(NamedTuple):
    pieces: list[Document]  # with their splits
    consumed: int  # source documents in this batch
    filled: int  # of them with content


def store_tokens(
    work: Workspace,
    source: Source,
    options: PrepareOptions,
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[SplitName, SplitWriter],
    progress: Progress,
) -> None:
    """Encode and store what is left of the source, committing every few seconds.

    Args:
        work: where progress is committed.
        source: read from ``progress.consumed`` on.
        options: split rule and token budget.
        tokenizer: of the folder.
        writers: one per split.
        progress: brought up to date.
    """
    committed = time.monotonic()
    budget = options.max_tokens
    documents = iter(()) if progress.full else source.documents_from(progress.consumed)
    pieces = assign_splits(documents, options.val_fraction, progress.filled)
    with (
        PrepareProgress(
            f"preparing {source.corpus}", budget or source.total_bytes, progress.tokens
        ) as shown,
        closing(_encoded(_batches(pieces), Encoder(tokenizer), source.tokenized)) as encoded,
    ):
        for batch, ragged in encoded:
            check_ids(
                ragged.values, len(tokenizer), f"{source.corpus}: after {progress.tokens} tokens"
            )
            _store(batch, ragged, writers, progress, budget)
            shown.update(progress.tokens if budget else source.position, progress.tokens)
            if time.monotonic() - committed >= _COMMIT_SECONDS or progress.full:
                progress.splits = {name: writer.commit() for name, writer in writers.items()}
                work.commit(progress)
                committed = time.monotonic()
            if progress.full:
                break


def _batches(documents: Iterator[list[Document]]) -> Iterator[_Batch]:
    pieces: list[Document] = []
    consumed = filled = size = 0
    for found in documents:
        length = sum(len(piece.content) for piece in found)
        pieces += found
        consumed += 1
        filled += length > 0
        size += length
        if size >= _BATCH_SIZE or consumed >= _BATCH_DOCUMENTS:
            yield _Batch(pieces, consumed, filled)
            pieces, consumed, filled, size = [], 0, 0, 0
    if consumed:
        yield _Batch(pieces, consumed, filled)


def _encoded(
    batches: Iterator[_Batch], encoder: Encoder, tokenized: bool
) -> Generator[tuple[_Batch, Ragged], None, None]:
    """Every batch in order with its tokens; two more are encoded while the caller stores one."""
    encode: Any = encoder.measure if tokenized else encoder.encode
    with ThreadPoolExecutor(_BATCHES_AHEAD) as pool:
        waiting: deque[tuple[_Batch, Future[Ragged]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encode, [p.content for p in batch.pieces])))
            if len(waiting) > _BATCHES_AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _store(
    batch: _Batch,
    ragged: Ragged,
    writers: dict[SplitName, SplitWriter],
    progress: Progress,
    max_tokens: int | None,
) -> None:
    stored = np.where(ragged.lengths > 0, ragged.lengths + 1, 0)  # with end-of-text
    totals = progress.tokens + np.cumsum(stored)
    affordable = totals <= (max_tokens or totals[-1])
    progress.full = not affordable[-1]
    chosen = affordable & (stored > 0)
    for name, writer in writers.items():
        writer.add(ragged.select(chosen & np.array([p.split == name for p in batch.pieces])))
    progress.tokens += int(stored[chosen].sum())
    progress.skipped += int((affordable & ~chosen).sum())
    progress.consumed += batch.consumed
    progress.filled += batch.filled
