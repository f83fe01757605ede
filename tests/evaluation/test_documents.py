"""Text, jsonl and prepared folders give the documents that the contract scores."""

import gzip
import json

import numpy as np
import pytest
import torch

from llmnorm.data import PrepareOptions, prepare
from llmnorm.data.sources import Jsonl
from llmnorm.errors import CheckpointError, ConfigError, DataError
from llmnorm.evaluation.documents import open_documents
from llmnorm.evaluation.loading import load
from llmnorm.evaluation.measure import measure_perplexity

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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty documents as jsonl rows."""
    rng = np.random.default_rng(0)
    words = ["norm", "depth", "naïve", "数", "gain\n\n", "of", "the"]
    file = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_a_prepared_split_scores_as_its_text_does(corpus, model_folder, tmp_path):
    """Tokens on disk and text tokenized on the way are the same documents."""
    source = Jsonl(corpus, text_column="text")
    options = PrepareOptions(tokenizer=str(model_folder), val_fraction=0.3, shard_tokens=500)
    prepared = prepare(source, tmp_path / "prepared", options)
    loaded = load(str(model_folder))
    by_split = [
        measure_perplexity(loaded, prepared.path, split=split).record for split in ("train", "val")
    ]
    whole = measure_perplexity(loaded, corpus).record
    nats = sum(part["loss"] * part["tokens"] for part in by_split)
    assert whole["loss"] * whole["tokens"] == pytest.approx(nats, rel=1e-6)
    for count in ("tokens", "bytes", "documents"):
        assert whole[count] == sum(part[count] for part in by_split)
    assert measure_perplexity(loaded, prepared.path).record["split"] == "val"
    with pytest.raises(DataError, match="has no split 'test'"):
        open_documents(prepared.path, loaded, split="test")


def test_tokens_of_another_tokenizer_are_refused(corpus, make_model, model_folder, tmp_path):
    source = Jsonl(corpus, text_column="text")
    prepared = prepare(source, tmp_path / "prepared", PrepareOptions(vocab_size=270)).path
    with pytest.raises(DataError, match="was tokenized with another tokenizer"):
        open_documents(prepared, load(str(model_folder)))
    bare = load(str(make_model(tokenizer=False)))  # 257 tokens, so the ids cannot be its own
    with pytest.raises(DataError, match="a vocabulary of 270, the model of 257"):
        open_documents(prepared, bare)
    fitting = load(str(make_model(tokenizer=False, vocab_size=270)))
    assert len(list(open_documents(prepared, fitting).documents)) > 0


@pytest.mark.fast
def test_a_folder_that_mixes_text_and_jsonl_is_refused(loaded, tmp_path):
    (tmp_path / ".hidden.json").write_text("{}")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert len(list(open_documents(tmp_path, loaded).documents)) == 2
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    with pytest.raises(DataError, match=r"mixes b\.jsonl with a\.txt"):
        open_documents(tmp_path, loaded)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.BIN", "rows.npy", "rows.bin.gz"])
def test_a_file_that_is_no_text_by_its_name_is_refused(loaded, tmp_path, name):
    (tmp_path / name).write_text("looks like text")
    with pytest.raises(DataError, match=r"no text by its name; prepare it"):
        open_documents(tmp_path / name, loaded)


def test_a_loss_that_is_not_finite_is_no_score(model_folder, text_file):
    spoilt = load(str(model_folder))
    spoilt.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="the loss is not finite"):
        measure_perplexity(spoilt, text_file)
