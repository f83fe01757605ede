"""Turn a source into a prepared folder: tokenizer, token shards, manifest.

Documents stream through: read, given a split, encoded in batches, appended to shards. Every few
seconds the work so far is committed; the same request continues from there. What is written is a
function of the request alone, however often it was interrupted. Read `prepared.py` next.
"""

import logging
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError, DataError
from .manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitEntry,
    SplitName,
    TokenizerEntry,
    file_entry,
    read_manifest,
)
from .prepared import Prepared, open_prepared
from .progress import PrepareProgress
from .ragged import Ragged
from .shards import SplitWriter
from .sources import Document, Source
from .splitting import assign_splits, split_rule
from .tokenizer import (
    TRAINING_BYTES,
    Encoder,
    check_ids,
    load_tokenizer,
    saved_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from .workspace import (
    SPLITS,
    Progress,
    Workspace,
    refuse_other_request,
    sync,
    tidy_after_publishing,
    write_atomically,
)

DEFAULT_VOCAB_SIZE = 4096
_BATCH_SIZE = 1 << 21  # characters (or tokens of a tokenized source) in a batch
_BATCH_DOCUMENTS = 1 << 14
_BYTES_PER_TOKEN = 8  # of text; more than tokens have, so that a budget's text is trained on
_COMMIT_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to make of a source.

    Attributes:
        tokenizer: folder, file or hub name of a tokenizer; None trains one on the train split.
        vocab_size: entries of a trained tokenizer; None is 4096.
        val_fraction: share of documents held out, at most one half; see `splitting.py`.
        max_tokens: stop before the document that would pass this number; None takes all.
        shard_tokens: tokens after which a shard is closed.
    """

    tokenizer: str | None = None
    vocab_size: int | None = None
    val_fraction: float = 0.05
    max_tokens: int | None = None
    shard_tokens: int = 1 << 27

    def __post_init__(self) -> None:
        if self.tokenizer and self.vocab_size:
            raise ConfigError("--tokenizer and --vocab-size exclude each other: give one")
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"--val-fraction {self.val_fraction} is not in (0, 0.5]")
        for name in ("max_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not a positive number")


class _Batch(NamedTuple):
    pieces: list[Document]  # with their splits
    consumed: int  # source documents in this batch
    empty: int  # of them without content


def prepare(
    source: Source, out: str | Path, options: PrepareOptions, *, restart: bool = False
) -> Prepared:
    """Make the prepared folder ``out``, continue an interrupted one, or return a finished one.

    Raises:
        ConfigError: options that exclude each other, or a tokenizer that does not fit.
        DataError: bad input, or ``out`` holds something else.
    """
    out = Path(out)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if source.tokenized and given is None:
        raise ConfigError(f"--source {source.kind} holds token ids: give their --tokenizer")
    request = _request(source, options, given)
    if _finished(out, request):
        tidy_after_publishing(out)
        logger.warning("%s is prepared already, from the same input and options", out)
        return open_prepared(out)
    with Workspace(out, request, restart) as work:
        tokenizer = _tokenizer(work, source, options, given)
        _write_tokens(work, source, options, tokenizer)
        work.publish()
    return open_prepared(out, verify=False)


def _request(
    source: Source, options: PrepareOptions, given: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    settings = asdict(options)
    if given is not None:
        settings["tokenizer"] = tokenizer_hash(given)
    else:
        settings["vocab_size"] = options.vocab_size or DEFAULT_VOCAB_SIZE
    return {"source": source.identity(), **settings}


def _finished(out: Path, request: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out} exists and is not a prepared folder; choose another --out")
    refuse_other_request(out, read_manifest(out).request, request, "remove that folder first")
    return True


def _tokenizer(
    work: Workspace,
    source: Source,
    options: PrepareOptions,
    given: PreTrainedTokenizerFast | None,
) -> PreTrainedTokenizerFast:
    if work.progress is not None:  # the first commit comes after the tokenizer is saved
        return saved_tokenizer(work.folder)
    tokenizer = given or train_tokenizer(
        _training_texts(source, options),
        options.vocab_size or DEFAULT_VOCAB_SIZE,
        min(TRAINING_BYTES, (options.max_tokens or TRAINING_BYTES) * _BYTES_PER_TOKEN),
    )
    tokenizer.save_pretrained(work.folder)
    saved = [path for path in sorted(work.folder.rglob("*")) if path.is_file()]
    for path in saved:
        sync(path)
    names = [path.relative_to(work.folder).as_posix() for path in saved]
    work.progress = Progress(tokenizer_files=names)
    work.commit(work.progress)
    return tokenizer


def _training_texts(source: Source, options: PrepareOptions) -> Iterator[str]:
    logger.info("training a tokenizer on the train split of %s", source.corpus)
    for pieces in assign_splits(source.documents(), options.val_fraction):
        for piece in pieces:
            if piece.split == "train":
                assert isinstance(piece.content, str)
                yield piece.content


def _write_tokens(
    work: Workspace, source: Source, options: PrepareOptions, tokenizer: PreTrainedTokenizerFast
) -> None:
    progress = work.progress
    assert progress is not None
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    eos_token_id = int(tokenizer.eos_token_id)
    writers = {
        split: SplitWriter(
            work.folder,
            split,
            dtype=dtype,
            shard_tokens=options.shard_tokens,
            eos_token_id=eos_token_id,
            state=progress.splits[split],
        )
        for split in SPLITS
    }
    try:
        _stream(work, source, options, tokenizer, writers, progress)
        manifest = _manifest(work, source, options, tokenizer, writers, progress)
    finally:
        for writer in writers.values():
            writer.abandon()
    write_atomically(work.folder / MANIFEST_NAME, manifest.to_json())


def _stream(
    work: Workspace,
    source: Source,
    options: PrepareOptions,
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[SplitName, SplitWriter],
    progress: Progress,
) -> None:
    """Encode and store what is left of the source, committing every few seconds."""
    committed = time.monotonic()
    budget = options.max_tokens
    documents = iter(()) if progress.full else source.documents_from(progress.consumed)
    pieces = assign_splits(documents, options.val_fraction, progress.filled)
    with (
        PrepareProgress(f"preparing {source.corpus}", budget or source.total_bytes) as shown,
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
    consumed = empty = size = 0
    for found in documents:
        pieces += found
        consumed += 1
        empty += not found
        size += sum(len(piece.content) for piece in found)
        if size >= _BATCH_SIZE or consumed >= _BATCH_DOCUMENTS:
            yield _Batch(pieces, consumed, empty)
            pieces, consumed, empty, size = [], 0, 0, 0
    if consumed:
        yield _Batch(pieces, consumed, empty)


def _encoded(
    batches: Iterator[_Batch], encoder: Encoder, tokenized: bool
) -> Generator[tuple[_Batch, Ragged], None, None]:
    """Every batch with its tokens; the next one is encoded while the caller stores this one."""
    encode: Any = encoder.measure if tokenized else encoder.encode
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in chain(batches, [None]):
            following = batch and (batch, pool.submit(encode, [p.content for p in batch.pieces]))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following


def _store(
    batch: _Batch,
    ragged: Ragged,
    writers: dict[SplitName, SplitWriter],
    progress: Progress,
    max_tokens: int | None,
) -> None:
    chosen = ragged.lengths > 0
    progress.skipped += batch.empty + int((~chosen).sum())
    if max_tokens is not None:
        totals = progress.tokens + np.cumsum((ragged.lengths + 1) * chosen)
        chosen &= totals <= max_tokens
        progress.full = bool(len(totals) and totals[-1] > max_tokens)
    for name, writer in writers.items():
        writer.add(ragged.select(chosen & np.array([p.split == name for p in batch.pieces], bool)))
    progress.tokens += int(((ragged.lengths + 1) * chosen).sum())
    progress.consumed += batch.consumed
    progress.filled += batch.consumed - batch.empty


def _manifest(
    work: Workspace,
    source: Source,
    options: PrepareOptions,
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[SplitName, SplitWriter],
    progress: Progress,
) -> Manifest:
    splits: dict[SplitName, SplitEntry] = {}
    for name in SPLITS:
        shards = writers[name].close()
        if not shards:
            raise DataError(_nothing(source, name, options, progress))
        totals = {
            field: sum(getattr(shard, field) for shard in shards)
            for field in ("tokens", "documents", "utf8_bytes")
        }
        splits[name] = SplitEntry(shards=tuple(shards), **totals)
    return Manifest(
        corpus=source.corpus,
        request=work.request,
        split_rule=split_rule(options.val_fraction),
        dtype="uint16" if len(tokenizer) <= 1 << 16 else "uint32",
        tokenizer=TokenizerEntry(
            origin=options.tokenizer or "trained on the train split",
            vocab_size=len(tokenizer),
            eos_token=str(tokenizer.eos_token),
            eos_token_id=int(tokenizer.eos_token_id),
            files=tuple(file_entry(work.folder, name) for name in progress.tokenizer_files),
        ),
        skipped_documents=progress.skipped,
        splits=splits,
        made_with={"tokenizers": tokenizers.__version__},
    )


def _nothing(source: Source, split: str, options: PrepareOptions, progress: Progress) -> str:
    if options.max_tokens is not None and progress.full:
        return (
            f"{source.corpus}: --max-tokens {options.max_tokens} leaves no document for the "
            f"{split} split (documents are never cut); raise it"
        )
    return (
        f"{source.corpus}: no text for the {split} split in {progress.consumed} documents "
        f"({progress.skipped} of them empty); expected text for training and validation"
    )
