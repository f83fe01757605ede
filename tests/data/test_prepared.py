"""A prepared folder gives back the text it was made from, or says what is wrong with it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmnorm.data import Prepared, PrepareOptions, open_prepared, prepare
from llmnorm.data.sources import Text
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
    assert not list(split.documents_for_scoring(max_documents=0))


@pytest.fixture
def copy(prepared: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.path, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x04
    path.write_bytes(data)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as error:
        open_prepared(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", range(0, 4000, 211))
def test_a_flipped_bit_anywhere_is_found(copy: Path, place: int) -> None:
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    file = files[place % len(files)]
    flip(file, place)
    refused(copy, file.name if file.suffix != ".json" else str(copy))


@pytest.mark.parametrize("name", ["train/tokens-00001.npy", "val/docs-00000.npy"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_off_shard_is_named_with_its_end(copy: Path, name: str, keep: float) -> None:
    data = (copy / name).read_bytes()
    size = int(len(data) * keep)
    (copy / name).write_bytes(data[:size])
    refused(copy, f"{name} ends at byte {size}, the manifest says {len(data)} bytes")
    with pytest.raises(DataError, match="ends at byte"):
        open_prepared(copy, verify=False)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train" / "docs-00002.npy").unlink()
    refused(copy, r"train/docs-00002\.npy is missing")


def test_a_foreign_shard_is_named(copy: Path, tmp_path: Path) -> None:
    tokens = copy / "train" / "tokens-00000.npy"
    shutil.copy(tokens, copy / "train" / "tokens-00099.npy")
    refused(copy, r"tokens-00099\.npy is not in the manifest; a foreign shard")
    (copy / "train" / "tokens-00099.npy").unlink()
    # Of the same size, but with other tokens: only its hash tells.
    array = np.load(tokens)
    np.save(tokens, array[::-1])
    refused(copy, r"train/tokens-00000\.npy: SHA-256 is")


def test_another_tokenizer_is_refused(copy: Path, tmp_path: Path, text_file: Path) -> None:
    options = PrepareOptions(vocab_size=270)
    other = prepare(Text(text_file, whole_files=False), tmp_path / "other", options)
    shutil.copy(other.path / "tokenizer.json", copy / "tokenizer.json")
    refused(copy, r"tokenizer\.json (ends at|has)")


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and make its checksum right again, as someone might who forges one."""
    from llmnorm.data.manifest import _checksum

    content = json.loads((folder / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = _checksum(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_manifest_that_does_not_fit_its_shards_is_refused(copy: Path) -> None:
    good = (copy / "manifest.json").read_text()
    edit(copy, lambda content: content.update(dtype="uint32"))
    refused(copy, r"holds uint16\[\d+\], the manifest says uint32")
    (copy / "manifest.json").write_text(good)
    edit(copy, lambda content: content["splits"]["val"].update(tokens=7))
    refused(copy, "do not add up")
    (copy / "manifest.json").write_text(good)
    edit(copy, lambda content: content.update(format="other-9"))
    refused(copy, "format")
    (copy / "manifest.json").write_text(good)
    edit(copy, lambda content: content.pop("corpus"))
    refused(copy, "corpus: Field required")


def test_ids_beyond_the_vocabulary_are_refused_when_read(copy: Path) -> None:
    edit(copy, lambda content: content["tokenizer"].update(vocab_size=200))
    prepared = open_prepared(copy)
    with pytest.raises(DataError, match=r"tokens-0000\d\.npy from 0: token \d+ has id 2\d\d"):
        prepared.split("train").window(0, 500)


def test_what_is_not_a_prepared_folder_is_named(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder; expected a folder made by `llmnorm data prep")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no manifest\.json")
    (copy / "manifest.json").write_text("[1]")
    refused(copy, r"manifest\.json: not a manifest")
    (copy / "manifest.json").write_bytes(b"\xff\xfe")
    refused(copy, r"manifest\.json: not a manifest")


def test_an_unknown_split_is_named(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"no split 'test' \(it has: train, val\)"):
        prepared.split("test")  # type: ignore[arg-type]


def test_a_shard_cut_while_in_use_is_an_error_and_no_crash(copy: Path) -> None:
    split = open_prepared(copy).split("train")
    split.window(0, 10)
    tokens = copy / "train" / "tokens-00000.npy"
    with tokens.open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(DataError, match=r"tokens-00000\.npy ends at byte 200"):
        split.window(0, 10)


@pytest.mark.parametrize("kind", ["tokens", "docs"])
def test_a_shard_written_to_while_in_use_is_an_error(copy: Path, kind: str) -> None:
    split = open_prepared(copy).split("train")
    rebuild, arguments = split.__reduce__()
    file = copy / "train" / f"{kind}-00000.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    message = rf"{kind}-00000\.npy was written to while in use"
    for opened in (split, rebuild(*arguments)):  # the second as a worker opens it
        with pytest.raises(DataError, match=message):
            opened.document(0)


def test_a_shard_replaced_while_in_use_is_read_as_it_was(copy: Path) -> None:
    split = open_prepared(copy).split("train")
    before = split.window(0, 100)
    file = copy / "train" / "tokens-00000.npy"
    (copy / "other").write_bytes(bytes(file.stat().st_size))
    (copy / "other").rename(file)
    assert np.array_equal(split.window(0, 100), before)


def test_more_shards_than_files_may_be_open(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared.split("train").window(0, prepared.split("train").tokens)
    monkeypatch.setattr("llmnorm.data.reading._MOST_OPEN_FILES", 1)
    before = len(os.listdir("/proc/self/fd"))
    split = open_prepared(prepared.path).split("train")
    assert np.array_equal(split.window(0, split.tokens), whole)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # a split each


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "train/../../x", "a\nb", "", "a//b"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(copy: Path, name: str) -> None:
    edit(copy, lambda content: content["tokenizer"]["files"][0].update(name=name))
    refused(copy, "is no path inside the folder")


def test_a_manifest_nested_too_deeply_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("[" * 100_000)
    refused(copy, r"nested too deeply")


def test_the_fingerprint_tells_data_apart(prepared: Prepared, copy: Path, tmp_path: Path) -> None:
    assert open_prepared(copy).fingerprint == prepared.fingerprint
    (tmp_path / "a.txt").write_text("other\n\ntexts")
    source = Text(tmp_path / "a.txt", whole_files=False)
    options = PrepareOptions(tokenizer=str(copy))
    assert prepare(source, tmp_path / "out", options).fingerprint != prepared.fingerprint
