"""The tokenizer of a prepared folder: trained byte-level BPE, or one that exists; and its use.

`tokenizers` runs batches on all cores by itself; one batch is encoded while the one before it is
written, so that reading, converting and writing cost little beside encoding.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..errors import ConfigError, DataError
from .ragged import Ragged

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and end-of-text
TRAINING_BYTES = 1 << 28  # text beyond this changes a vocabulary little and costs memory

_LONGEST_PIECE = 1 << 20  # characters encoded at once
_CHARACTERS_TOGETHER = 1 << 22
_SURROUNDINGS = 200  # characters looked at on each side of a cut
_PLACES_TRIED = 50
_BETWEEN_WORDS = re.compile(r"(?<=\w)\s(?=\w)")
_NO_IDS = np.zeros(0, dtype=np.uint32)

logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_bytes: int = TRAINING_BYTES
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, as GPT-2's: any text is encoded and decoded without loss.

    Args:
        texts: documents.
        vocab_size: entries including end-of-text, which is id 0. Text too small for so many
            merges gives fewer, with a notice.
        max_bytes: the documents that begin in this many bytes of text are used.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
            f"{SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, max_bytes), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        logger.warning("the text is too small for %d tokens; vocabulary: %d", vocab_size, size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def load_tokenizer(origin: str) -> PreTrainedTokenizerFast:
    """A tokenizer by folder, `tokenizer.json` file or hub name.

    Raises:
        ConfigError: it cannot be loaded, is not a fast one, or has no end-of-text token.
    """
    try:
        if Path(origin).is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=origin)
            if END_OF_TEXT in tokenizer.get_vocab():
                tokenizer.eos_token = END_OF_TEXT
        else:
            tokenizer = saved_tokenizer(origin)
    except Exception as error:  # many kinds, from the hub, the parser and the file system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--tokenizer {origin} cannot be loaded: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"--tokenizer {origin} is {type(tokenizer).__name__}, which has no fast version; "
            "give one that has a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"--tokenizer {origin} has no end-of-text (eos) token, which separates documents; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub name, by its own class; no remote code is run."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(PreTrainedTokenizerFast, tokenizer)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how text becomes ids, and of the end-of-text id."""
    content = f"{tokenizer.backend_tokenizer.to_str()}|{tokenizer.eos_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()


class Encoder:
    """Turn texts into `Ragged` documents, without special tokens.

    A literal "<|endoftext|>" in a text is encoded as ordinary text: only document borders are
    end-of-text tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, texts: list[str]) -> Ragged:
        """Encode a batch on all cores."""
        pieces = [self._pieces(text) for text in texts]
        encoded = [self._encode(group) for group in _groups(chain.from_iterable(pieces))]
        firsts = np.cumsum([0, *(len(found) for found in pieces)])[:-1]
        lengths = np.concatenate([_NO_IDS, *(lengths for _, lengths in encoded)]).astype(np.int64)
        return Ragged(
            np.concatenate([_NO_IDS, *(ids for ids, _ in encoded)]),
            np.add.reduceat(lengths, firsts) if texts else lengths,
            np.array([len(text.encode()) for text in texts], dtype=np.int64),
        )

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, dtype=np.uint32, count=int(lengths.sum())), lengths

    def _pieces(self, text: str) -> list[str]:
        """A long text in pieces that encode as the whole does.

        A text costs a hundred times its size in memory while it is encoded. It is cut only between
        words, where encoding the surroundings whole and in two gives the same ids.
        """
        pieces = []
        begin = 0
        while len(text) - begin > _LONGEST_PIECE:
            places = _BETWEEN_WORDS.finditer(text, begin + _LONGEST_PIECE)
            tried = (match.start() for match in islice(places, _PLACES_TRIED))
            cut = next((place for place in tried if self._may_cut(text, place)), None)
            if cut is None:
                break
            pieces.append(text[begin:cut])
            begin = cut
        return [*pieces, text[begin:]]

    def _may_cut(self, text: str, place: int) -> bool:
        left = text[max(place - _SURROUNDINGS, 0) : place]
        right = text[place : place + _SURROUNDINGS]
        ids, lengths = self._encode([left + right, left, right])
        return np.array_equal(ids[: lengths[0]], ids[lengths[0] :])

    def measure(self, documents: list[np.ndarray]) -> Ragged:
        """Documents that are ids already; their UTF-8 bytes are counted by decoding them."""
        texts = self.decode(documents)
        return Ragged(
            np.concatenate(documents) if documents else np.zeros(0, dtype=np.uint32),
            np.array([len(ids) for ids in documents], dtype=np.int64),
            np.array([len(text.encode()) for text in texts], dtype=np.int64),
        )

    def decode(self, documents: list[np.ndarray]) -> list[str]:
        """The texts of (length,) arrays of ids, without tidying."""
        return self.backend.decode_batch([ids.tolist() for ids in documents], False)


def _groups(pieces: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _CHARACTERS_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def check_ids(values: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise a `DataError` when a (count,) array holds an id outside the vocabulary."""
    if len(values) and (int(values.max()) >= vocab_size or int(values.min()) < 0):
        position = int(np.flatnonzero((values >= vocab_size) | (values < 0))[0])
        raise DataError(
            f"{where}: token {position} has id {int(values[position])}, beyond the vocabulary of "
            f"{vocab_size}; the tokens belong to another tokenizer or the file is damaged"
        )
