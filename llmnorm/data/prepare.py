"""Turn a source into a prepared folder: tokenizer, token shards, manifest.

Documents stream through: read, given a split, encoded in batches, appended to shards. Every few
seconds the work so far is committed; the same request continues from there. What is written is a
function of the request alone, however often it was interrupted. Read `prepared.py` next.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from ..durable import sync, write_durably
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
from .options import DEFAULT_VOCAB_SIZE, PrepareOptions
from .prepared import Prepared, open_prepared
from .shards import SplitWriter
from .sources import Source
from .splitting import assign_splits, split_rule
from .stream import store_tokens
from .tokenizer import (
    TRAINING_BYTES,
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
    tidy_after_publishing,
)

_BYTES_PER_TOKEN = 8  # of text; more than tokens have, so that a budget's text is trained on

logger = logging.getLogger(__name__)


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
    try:
        if _finished(out, request):
            tidy_after_publishing(out)
            logger.warning("%s is prepared already, from the same input and options", out)
            return open_prepared(out)
        with Workspace(out, request, restart) as work:
            tokenizer = _tokenizer(work, source, options, given)
            manifest = _write_tokens(work, source, options, tokenizer)
            if manifest.skipped_documents:
                logger.info("%d documents without text are skipped", manifest.skipped_documents)
            work.publish()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error}; when that is mended the same command continues"
        ) from None
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
        if out.resolve() == Path.cwd():
            raise DataError(f"--out {out} is the current folder, which cannot be replaced")
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
) -> Manifest:
    progress = work.progress
    assert progress is not None
    writers = {
        split: SplitWriter(
            work.folder,
            split,
            dtype=np.dtype(_dtype(tokenizer)),
            shard_tokens=options.shard_tokens,
            eos_token_id=int(tokenizer.eos_token_id),
            state=progress.splits[split],
        )
        for split in SPLITS
    }
    try:
        store_tokens(work, source, options, tokenizer, writers, progress)
        manifest = _manifest(work, source, options, tokenizer, writers, progress)
    finally:
        for writer in writers.values():
            writer.abandon()
    write_durably(work.folder / MANIFEST_NAME, manifest.to_json())
    return manifest


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
        dtype=_dtype(tokenizer),
        tokenizer=TokenizerEntry(
            origin=_origin(options),
            vocab_size=len(tokenizer),
            eos_token=str(tokenizer.eos_token),
            eos_token_id=int(tokenizer.eos_token_id),
            files=tuple(file_entry(work.folder, name) for name in progress.tokenizer_files),
        ),
        skipped_documents=progress.skipped,
        splits=splits,
        made_with={"tokenizers": tokenizers.__version__},
    )


def _dtype(tokenizer: PreTrainedTokenizerFast) -> Literal["uint16", "uint32"]:
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


def _origin(options: PrepareOptions) -> str:
    """Where the tokenizer comes from: a hub name, or the last part of a path."""
    if options.tokenizer is None:
        return "trained on the train split"
    path = Path(options.tokenizer)
    return path.resolve().name if path.exists() else options.tokenizer


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
