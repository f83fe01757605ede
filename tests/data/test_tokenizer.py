"""Byte-level BPE loses nothing, and end-of-text means a border and nothing else."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmnorm.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    check_ids,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from llmnorm.errors import ConfigError, DataError

from .conftest import make_documents

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_documents(100), 300)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_encoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ragged = Encoder(tokenizer).encode([text, "other"])
    ids = ragged.values[: ragged.lengths[0]]
    assert tokenizer.decode(ids) == text
    assert ragged.utf8_bytes.tolist() == [len(text.encode()), 5]


def test_a_written_out_end_of_text_is_ordinary_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"before {END_OF_TEXT} after"
    ids = Encoder(tokenizer).encode([text]).values
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in tokenizer(text).input_ids  # as it would be otherwise


def test_batches_equal_one_by_one_encoding(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = make_documents(30, seed=1)
    ragged = Encoder(tokenizer).encode(texts)
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert ragged.lengths.tolist() == [len(ids) for ids in expected]
    assert ragged.values.tolist() == [i for ids in expected for i in ids]


def long_text() -> str:
    rng = np.random.default_rng(0)
    joints = [" ", "  ", "\n", "\n\n    ", "\t", ", "]
    words = " ".join(make_documents(60, seed=4)).split()
    return "".join(word + joints[int(rng.integers(len(joints)))] for word in words)


def test_a_long_text_in_pieces_encodes_as_the_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = long_text()
    encoder = Encoder(tokenizer)
    whole = encoder.encode(["first", text, "", "last"])
    monkeypatch.setattr("llmnorm.data.tokenizer._LONGEST_PIECE", 300)
    monkeypatch.setattr("llmnorm.data.tokenizer._CHARACTERS_TOGETHER", 1000)
    assert len(encoder._pieces(text)) > 10
    pieces = encoder.encode(["first", text, "", "last"])
    assert pieces.values.tolist() == whole.values.tolist()
    assert pieces.lengths.tolist() == whole.lengths.tolist()
    assert pieces.utf8_bytes.tolist() == whole.utf8_bytes.tolist()


def test_a_text_is_not_cut_where_that_would_change_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This tokenizer takes whatever it is given as one word.
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>"))
    monkeypatch.setattr("llmnorm.data.tokenizer._LONGEST_PIECE", 50)
    text = "a " * 100
    assert encoder._pieces(text) == [text]
    assert encoder.encode([text]).lengths.tolist() == [1]


def test_training_is_deterministic_and_has_the_size_asked_for() -> None:
    texts = make_documents(100)
    first, second = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert len(first) == 300
    assert first.eos_token_id == 0


def test_a_small_corpus_gives_a_smaller_vocabulary_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "llmnorm"):
        tokenizer = train_tokenizer(["a few words, a few merges"], 5000)
    assert 257 < len(tokenizer) < 300
    assert "too small for 5000 tokens" in caplog.text


def test_a_saved_tokenizer_is_loaded_by_folder_and_by_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    for origin in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(origin))
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == END_OF_TEXT


def test_tokenizers_that_cannot_serve_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer .*nowhere cannot be loaded") as error:
        load_tokenizer(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    content = json.loads(tokenizer.backend_tokenizer.to_str().replace(END_OF_TEXT, "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"no end-of-text \(eos\) token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_ids_outside_the_vocabulary_are_named() -> None:
    check_ids(np.array([0, 9]), 10, "here")
    with pytest.raises(DataError, match="here: token 1 has id 10, beyond the vocabulary of 10"):
        check_ids(np.array([3, 10]), 10, "here")
    with pytest.raises(DataError, match="token 0 has id -1"):
        check_ids(np.array([-1, 10]), 10, "here")
