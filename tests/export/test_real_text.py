"""Text for comparisons: a file's, Python's own, or random ids where there is no tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmnorm.errors import DataError
from llmnorm.export.real_text import real_text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ASCII, 0 for all others."""
    vocab = {"?": 0} | {chr(code): code for code in range(1, 128) if chr(code) != "?"}
    made = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_without_a_file_it_is_pythons_own_manual(tokenizer):
    ids, source = real_text(tokenizer, 128, 64, 3)
    assert ids.shape == (3, 64)
    assert source == "Python's language reference"
    assert "statement" in "".join(map(chr, ids.flatten()))
    assert torch.equal(ids, real_text(tokenizer, 128, 64, 3)[0])


def test_a_file_of_the_users_is_taken_and_named(tokenizer, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("abcdefghijklmnopqrst")
    ids, source = real_text(tokenizer, 128, 8, 4, file=file)
    assert source == "mine.txt"
    assert ids.tolist() == [[*map(ord, "abcdefgh")], [*map(ord, "ijklmnop")]]
    assert real_text(tokenizer, 128, 64, 4, file=file)[0].shape == (1, 20)


def test_a_model_without_tokenizer_gets_random_ids_and_it_is_said():
    ids, source = real_text(None, 11, 16, 2)
    assert source == "random ids, as the model has no tokenizer"
    assert ids.shape == (2, 16)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 11
    assert torch.equal(ids, real_text(None, 11, 16, 2)[0])


@pytest.mark.parametrize(
    ("content", "vocab", "said"),
    [
        (b"short", 128, "5 tokens; a comparison needs at least 8"),
        (b"\xff\xfe\x00", 128, "cannot be read as text"),
        (None, 128, "cannot be read as text"),
        (b"abcdefghij", 100, "gives token 106, but the model has 100 entries"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tokenizer, tmp_path, content, vocab, said):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        real_text(tokenizer, vocab, 8, 2, file=file)
