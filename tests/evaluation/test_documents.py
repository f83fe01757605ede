"""Text, jsonl and prepared folders give the documents that the contract scores."""

import gzip
import json

import numpy as np
import pytest

from llmnorm.errors import ConfigError, DataError
from llmnorm.evaluation.documents import open_documents
from llmnorm.evaluation.loading import load

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


def texts(documents, loaded) -> list[tuple[str, int]]:
    return [(loaded.tokenizer.decode(ids), size) for ids, size in documents.documents]


def test_blank_lines_separate_the_documents_of_a_text_file(loaded, text_file):
    documents = open_documents(text_file, loaded)
    assert documents.eos_token_id == 0
    assert texts(documents, loaded) == [
        ("one document", 12),
        ("another, naïve one\nof two lines", 32),  # ï is two bytes
        ("x", 1),
    ]


def test_a_byte_is_a_token_here_so_tokens_and_bytes_agree(loaded, text_file):
    for ids, size in open_documents(text_file, loaded).documents:
        assert ids.shape == (size,)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_jsonl_rows_are_documents(loaded, tmp_path, ending):
    file = tmp_path / f"rows{ending}"
    rows = "".join(json.dumps({"body": text}) + "\n" for text in ("a\n\nb", "<|endoftext|>"))
    file.write_bytes(gzip.compress(rows.encode()) if ending.endswith("gz") else rows.encode())
    documents = list(open_documents(file, loaded, text_column="body").documents)
    assert [size for _, size in documents] == [4, 13]
    assert 0 not in np.concatenate([ids for ids, _ in documents])  # text never means end-of-text
    with pytest.raises(DataError, match="no field 'text'"):
        list(open_documents(file, loaded).documents)


def test_max_documents_takes_the_first(loaded, text_file):
    assert len(list(open_documents(text_file, loaded, max_documents=2).documents)) == 2


def test_the_fingerprint_follows_the_content(loaded, text_file):
    before = open_documents(text_file, loaded).record["data_fingerprint"]
    text_file.write_text("other")
    assert open_documents(text_file, loaded).record["data_fingerprint"] != before


def test_a_missing_file_a_split_of_text_and_a_missing_end_of_text_are_explained(
    loaded, text_file, make_model, tmp_path
):
    with pytest.raises(DataError, match="does not exist"):
        open_documents(tmp_path / "absent.txt", loaded)
    with pytest.raises(ConfigError, match="--split val is for prepared folders"):
        open_documents(text_file, loaded, split="val")
    with pytest.raises(ConfigError, match="--eos-token"):
        open_documents(text_file, load(str(make_model(eos=False))))
