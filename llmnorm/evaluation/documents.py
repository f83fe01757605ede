"""Where scored documents come from: a prepared folder, or text that is tokenized on the way.

A prepared folder holds tokens, so its tokenizer must be the model's; text and jsonl files are
tokenized with the model's own. `perplexity.py` scores what comes out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmnorm.data.files import files_identity
from llmnorm.data.manifest import MANIFEST_NAME
from llmnorm.data.prepared import Prepared, open_prepared
from llmnorm.data.sources import FileSource, Jsonl, Text
from llmnorm.data.tokenizer import Encoder, tokenizer_hash
from llmnorm.errors import ConfigError, DataError
from llmnorm.evaluation.loading import Loaded

_TEXTS_TOGETHER = 256
_JSON_ENDINGS = (".jsonl", ".json")
_BINARY = (".parquet", ".arrow", ".feather", ".bin", ".idx", ".npy", ".npz", ".pt", ".safetensors",
           ".pkl", ".h5", ".hdf5", ".zip", ".tar", ".pdf")  # fmt: skip
_COMPRESSED = (".gz", ".xz", ".zst")

Scored = Iterator[tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Documents:
    """Documents to score, once: (token ids without end-of-text, UTF-8 bytes), and their names."""

    documents: Scored
    eos_token_id: int
    record: dict[str, Any]
    """What identifies the data: `data`, `split` of a prepared folder, `data_fingerprint`."""


def open_documents(
    path: Path,
    loaded: Loaded,
    *,
    split: str | None = None,
    max_documents: int | None = None,
    text_column: str = "text",
) -> Documents:
    """Open `path` for scoring with `loaded`.

    Args:
        path: a prepared folder, or a text or jsonl file or folder (also .gz, .xz, .zst). A text
            file's documents are separated by blank lines.
        loaded: the model, for its tokenizer.
        split: of a prepared folder, `val` by default.
        max_documents: the first so many.
        text_column: the field of a jsonl row that holds the text.

    Raises:
        DataError: data that is missing, damaged or of another tokenizer.
        ConfigError: no tokenizer, or one without an end-of-text token.
    """
    if (path / MANIFEST_NAME).is_file():
        return _prepared(path, loaded, split or "val", max_documents)
    if split is not None:
        raise ConfigError(f"--split {split} is for prepared folders, and {path} is not one")
    source = _source(path, text_column)
    tokenizer = loaded.require_tokenizer()
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {loaded.source.location} names no end-of-text token, with which"
            " every document begins; name one of its tokens with --eos-token TOKEN"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no fast version; name one with --tokenizer"
        )
    identity = files_identity(source.files, path)
    return Documents(
        documents=_tokenized(source, Encoder(tokenizer), max_documents),
        eos_token_id=tokenizer.eos_token_id,
        record={"data": str(path), "split": None, "data_fingerprint": identity["sha256"]},
    )


def _prepared(path: Path, loaded: Loaded, split: str, max_documents: int | None) -> Documents:
    prepared = open_prepared(path)
    if split not in prepared.manifest.splits:
        raise DataError(
            f"{path} has no split {split!r}; it has {', '.join(prepared.manifest.splits)}"
        )
    _check_tokenizer(prepared, loaded)
    return Documents(
        documents=prepared.split(split).documents_for_scoring(max_documents),
        eos_token_id=prepared.eos_token_id,
        record={"data": str(path), "split": split, "data_fingerprint": prepared.fingerprint},
    )


def _check_tokenizer(prepared: Prepared, loaded: Loaded) -> None:
    """Ids mean the same text only under the same tokenizer; without one, trust the vocabulary."""
    if loaded.tokenizer is None:
        vocab_size = loaded.model.config.get_text_config().vocab_size
        if vocab_size < prepared.vocab_size:
            raise DataError(
                f"{prepared.path} has a vocabulary of {prepared.vocab_size}, the model of"
                f" {vocab_size}; score the text itself with the model's tokenizer"
            )
        return
    same = isinstance(loaded.tokenizer, PreTrainedTokenizerFast) and (
        tokenizer_hash(loaded.tokenizer) == tokenizer_hash(prepared.tokenizer())
    )
    if not same:
        raise DataError(
            f"{prepared.path} was tokenized with another tokenizer than that of"
            f" {loaded.source.location}; pass the text itself (--data FILE.txt or FILE.jsonl),"
            " which is tokenized with the model's own"
        )


def _source(path: Path, text_column: str) -> FileSource:
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a prepared folder, a text file or a jsonl file"
        )
    if path.is_file() and _without_compression(path.name).lower().endswith(_BINARY):
        raise DataError(
            f"{path} is no text by its name; prepare it with llmnorm data prepare,"
            " or give a text or jsonl file"
        )
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    names = [file.name for file in files if not file.name.startswith(".")]
    json = [n for n in names if _without_compression(n).endswith(_JSON_ENDINGS)]
    if json and len(json) < len(names):
        other = next(name for name in names if name not in json)
        raise DataError(
            f"{path} mixes {json[0]} with {other}; give a folder of one kind, or a file"
        )
    return Jsonl(path, text_column=text_column) if json else Text(path, whole_files=False)


def _without_compression(name: str) -> str:
    return name[: name.rindex(".")] if name.endswith(_COMPRESSED) else name


def _tokenized(source: FileSource, encoder: Encoder, max_documents: int | None) -> Scored:
    texts = (str(document.content) for document in islice(source.documents(), max_documents))
    while batch := list(islice(texts, _TEXTS_TOGETHER)):
        encoded = encoder.encode(batch)
        parts = np.split(encoded.values, np.cumsum(encoded.lengths)[:-1])
        yield from zip(parts, encoded.utf8_bytes.tolist(), strict=True)
