"""What a prepared folder holds, and what asking again does."""

import json
import logging
from pathlib import Path

import pytest

from llmnorm.data import PrepareOptions, open_prepared, prepare, stream
from llmnorm.data.sources import Jsonl, PythonStdlib, Text
from llmnorm.errors import ConfigError, DataError

from .conftest import folder_bytes, make_documents

SMALL = PrepareOptions(vocab_size=300, val_fraction=0.1)


def text(tmp_path: Path, content: str, *, whole_files: bool = False, name: str = "a.txt") -> Text:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return Text(tmp_path / name, whole_files=whole_files)


@pytest.mark.fast
def test_the_same_request_gives_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(Text(text_file, whole_files=False), tmp_path / name, SMALL)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


@pytest.mark.fast
def test_a_finished_folder_is_returned_untouched(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Text(text_file, whole_files=False)
    first = prepare(source, tmp_path / "a", SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    with caplog.at_level(logging.INFO, "llmnorm"):
        again = prepare(source, tmp_path / "a", SMALL)
    assert "prepared already" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


@pytest.mark.fast
def test_a_finished_folder_of_another_request_is_refused(text_file: Path, tmp_path: Path) -> None:
    source = Text(text_file, whole_files=False)
    prepare(source, tmp_path / "a", SMALL)
    before = folder_bytes(tmp_path / "a")
    with pytest.raises(DataError, match="made with vocab_size = 300, now 280 is asked for"):
        prepare(source, tmp_path / "a", PrepareOptions(vocab_size=280, val_fraction=0.1))
    changed = text(tmp_path, text_file.read_text(encoding="utf-8") + "\n\nmore")
    with pytest.raises(DataError, match=r"made with source\."):
        prepare(changed, tmp_path / "a", SMALL)
    assert folder_bytes(tmp_path / "a") == before


@pytest.mark.fast
def test_a_folder_with_other_files_is_refused(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="exists and is not a prepared folder"):
        prepare(Text(text_file, whole_files=False), tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"


@pytest.mark.fast
def test_an_empty_folder_may_be_filled(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    prepare(Text(text_file, whole_files=False), tmp_path / "a", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no debris


@pytest.mark.fast
@pytest.mark.parametrize("count", [2, 3, 50])
def test_both_splits_have_documents(tmp_path: Path, count: int) -> None:
    documents = make_documents(count)
    prepared = prepare(text(tmp_path, "\n\n".join(documents)), tmp_path / "out", SMALL)
    train, val = prepared.split("train"), prepared.split("val")
    assert train.documents + val.documents == count
    assert val.documents == -(-count // 10)


@pytest.mark.fast
def test_a_single_document_is_cut_by_position(tmp_path: Path) -> None:
    content = "\n".join(f"line {i} of a play" for i in range(400))
    source = text(tmp_path, content, whole_files=True)
    prepared = prepare(source, tmp_path / "out", PrepareOptions(vocab_size=300, val_fraction=0.25))
    tokenizer = prepared.tokenizer()
    train, val = (tokenizer.decode(prepared.split(s).document(0)[1:]) for s in ("train", "val"))
    assert train + val == content
    assert train.endswith("\n")  # between lines
    assert 0.2 < len(val) / len(content) < 0.3
    assert "cut by position" in prepared.manifest.split_rule


@pytest.mark.fast
def test_max_tokens_stops_before_the_document_that_would_pass(tmp_path: Path) -> None:
    source = text(tmp_path, "\n\n".join(make_documents(200)))
    whole = prepare(source, tmp_path / "whole", SMALL)
    options = PrepareOptions(tokenizer=str(tmp_path / "whole"), val_fraction=0.1, max_tokens=3000)
    part = prepare(source, tmp_path / "part", options)
    total = part.split("train").tokens + part.split("val").tokens
    longest = max(len(whole.split("train").document(i)) for i in range(100))
    assert 3000 - longest <= total <= 3000
    for i in range(part.split("train").documents):
        expected = whole.split("train").document(i)
        assert part.split("train").document(i).tolist() == expected.tolist()
    tiny = PrepareOptions(tokenizer=str(tmp_path / "whole"), max_tokens=3)
    with pytest.raises(DataError, match="--max-tokens 3 leaves no document"):
        prepare(source, tmp_path / "tiny", tiny)


@pytest.mark.fast
def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = ["", "one document", "", "another document", "", "", "a third"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepared = prepare(Jsonl(path, text_column="text"), tmp_path / "out", SMALL)
    assert prepared.manifest.skipped_documents == 4
    assert prepared.split("train").documents + prepared.split("val").documents == 3


@pytest.mark.fast
@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_batches_do_not_show_in_the_folder(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(80)
    rows = [text for pair in zip(documents, [""] * 80, strict=True) for text in pair]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = PrepareOptions(vocab_size=300, val_fraction=0.1, max_tokens=2000, shard_tokens=300)
    prepare(Jsonl(path, text_column="text"), tmp_path / "whole", options)
    monkeypatch.setattr(stream, "_BATCH_SIZE", size)
    prepare(Jsonl(path, text_column="text"), tmp_path / "small", options)
    assert folder_bytes(tmp_path / "small") == folder_bytes(tmp_path / "whole")


@pytest.mark.fast
def test_a_link_may_be_filled_but_not_the_current_folder(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    prepare(Text(text_file, whole_files=False), tmp_path / "link", SMALL)
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="is the current folder"):
        prepare(Text(text_file, whole_files=False), ".", SMALL)


@pytest.mark.fast
def test_input_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text for the train split in 0 documents"):
        prepare(text(tmp_path, " \n\n \n"), tmp_path / "out", SMALL)


@pytest.mark.fast
def test_impossible_options_are_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        PrepareOptions(tokenizer="gpt2", vocab_size=300)
    with pytest.raises(ConfigError, match=r"--val-fraction 0\.9"):
        PrepareOptions(val_fraction=0.9)
    with pytest.raises(ConfigError, match="--max-tokens 0"):
        PrepareOptions(max_tokens=0)
    with pytest.raises(ConfigError, match="--vocab-size 100 is too small"):
        prepare(
            Text(text_file, whole_files=False), tmp_path / "out", PrepareOptions(vocab_size=100)
        )


@pytest.mark.fast
def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path, text_file: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    source = text(tmp_path, "w69999 w3\n\nw65536 w65535\n\nw1 w2")
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer.json"))
    prepared = prepare(source, tmp_path / "out", options)
    assert prepared.manifest.dtype == "uint32"
    assert prepared.split("val").document(0).tolist() == [70_000, 69_999, 3]
    assert prepared.split("train").document(0).tolist() == [70_000, 65_536, 65_535]


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    source = PythonStdlib()
    names = [file.name for file in source.files]
    assert "dataclasses.py" in names
    assert not any("idlelib" in file.parts or "test" in file.parts for file in source.files)
    options = PrepareOptions(vocab_size=512, max_tokens=40_000)
    prepared = prepare(source, tmp_path / "out", options)
    first = prepared.tokenizer().decode(prepared.split("val").document(0)[1:])
    assert first == source.files[0].read_text(encoding="utf-8")
    assert open_prepared(tmp_path / "out").fingerprint == prepared.fingerprint
