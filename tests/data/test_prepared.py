"""A prepared folder gives back the text it was made from."""

import numpy as np
import pytest

from llmnorm.data import Prepared
from llmnorm.data.splitting import is_validation
from llmnorm.errors import DataError

pytestmark = pytest.mark.fast


def test_documents_decode_to_the_source_text(prepared: Prepared, text_file) -> None:
    texts = text_file.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    tokenizer = prepared.tokenizer()
    for name, held_out in (("train", False), ("val", True)):
        split = prepared.split(name)
        expected = [text for i, text in enumerate(texts) if is_validation(i, 10) is held_out]
        found = [split.document(i) for i in range(split.documents)]
        assert [tokenizer.decode(tokens[1:]) for tokens in found] == expected
        assert {int(tokens[0]) for tokens in found} == {prepared.eos_token_id}
        sizes = [len(text.encode()) for text in expected]
        assert [split.document_bytes(i) for i in range(split.documents)] == sizes
        assert split.utf8_bytes == sum(sizes)


def test_window_crosses_shards(prepared: Prepared) -> None:
    split = prepared.split("train")
    shards = sorted(split.path.glob("tokens-*.npy"))
    assert len(shards) > 2
    stream = np.concatenate([np.load(shard) for shard in shards])
    assert len(stream) == split.tokens
    assert np.array_equal(split.window(0, split.tokens), stream)
    assert np.array_equal(split.window(1500, 3000), stream[1500:4500])
    assert split.window(0, 5).dtype == np.int64


def test_window_outside_the_split_is_refused(prepared: Prepared) -> None:
    split = prepared.split("train")
    with pytest.raises(DataError, match="were asked for"):
        split.window(split.tokens - 3, 4)


def test_documents_for_scoring_are_without_end_of_text(prepared: Prepared) -> None:
    split = prepared.split("val")
    scored = list(split.documents_for_scoring())
    assert len(scored) == split.documents
    assert sum(len(tokens) + 1 for tokens, _ in scored) == split.tokens
    assert sum(size for _, size in scored) == split.utf8_bytes
    assert all(prepared.eos_token_id not in tokens for tokens, _ in scored)
    assert len(list(split.documents_for_scoring(max_documents=3))) == 3
