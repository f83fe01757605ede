"""Every source gives its documents in a fixed order; bad input is named with file and place."""

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmnorm.data.sources import Jsonl, Source, Text
from llmnorm.data.tables import HubDataset, Parquet
from llmnorm.errors import DataError

pytestmark = pytest.mark.fast
ROWS = ["first document", "second\n\nwith a blank line", "", "déjà-vu 数 🙂", "NUL \0 inside"]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def contents(source: Source, start: int = 0) -> list[str]:
    return [str(document.content) for document in source.documents_from(start)]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 400
    return message


def jsonl_bytes() -> bytes:
    return b"".join(json.dumps({"id": 1, "text": row}).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](jsonl_bytes()))
    source = Jsonl(path, text_column="text")
    assert contents(source) == ROWS
    assert contents(source, 2) == ROWS[2:]
    assert source.corpus == "rows"


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, -1])
def test_cut_off_compressed_files_are_noticed(tmp_path: Path, ending: str, keep: float) -> None:
    rows = [json.dumps({"text": os.urandom(200).hex()}) for _ in range(200)]
    data = COMPRESS[ending]("\n".join(rows).encode())
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data[: int(len(data) * keep) if keep > 0 else -1])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: (compressed data|line \d+)") as error:
        contents(Jsonl(path, text_column="text"))
    assert "byte" in one_line(error)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_damaged_compressed_files_are_noticed(tmp_path: Path, ending: str) -> None:
    # One frame with a checksum, as the command-line tools write them.
    compress = {**COMPRESS, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
    data = bytearray(compress(jsonl_bytes() * 20))
    for place in range(12, len(data), max(len(data) // 40, 1)):
        damaged = data.copy()
        damaged[place] ^= 0x10
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(damaged)
        try:
            found = contents(Jsonl(path, text_column="text"))
        except DataError:
            continue
        assert found == ROWS * 20  # an unused bit; never changed text


def test_frames_one_after_another_are_read_whole(tmp_path: Path) -> None:
    half = jsonl_bytes()
    for ending in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(COMPRESS[ending](half) + COMPRESS[ending](half))
        assert contents(Jsonl(path, text_column="text")) == ROWS * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', "line 2 (byte 14) is not JSON"),
        (b"[1, 2]", "line 2 (byte 14) is a JSON list; expected an object"),
        (b'{"txt": "a"}', "line 2 (byte 14) has no field 'text' (fields: txt)"),
        (b'{"text": 7}', "line 2 (byte 14): field 'text' is int; expected a string"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'{"text": ["a"]}', "field 'text' is list"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
        (b'{"text": "\xff"}', "byte 24 is not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 24 is not UTF-8"),
        (b'{"text": "\xc0\xaf"}', "byte 24 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a"} x', "line 2 (byte 14) is not JSON"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    with pytest.raises(DataError) as error:
        contents(Jsonl(path, text_column="text"))
    assert complaint in one_line(error)
    assert str(path) in one_line(error)


def test_blank_lines_and_a_byte_order_mark_in_jsonl_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"t": "x\\r\\n"}\r\n\r\n  \n{"t": "y"}')
    assert contents(Jsonl(path, text_column="t")) == ["x\r\n", "y"]


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n\none\nline two\n \t\n\n\ntwo déjà\n\nthree".encode())
    assert contents(Text(path, whole_files=False)) == ["one\nline two", "two déjà", "three"]


def test_windows_text_becomes_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\ntwo\rkept\r\n")
    assert contents(Text(path, whole_files=False)) == ["one\nmore", "two\rkept"]
    assert contents(Text(path, whole_files=True)) == ["one\nmore\n\ntwo\rkept\n"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.txt", "c.md", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"from {name}\n")
    found = contents(Text(tmp_path, whole_files=True))
    assert found == ["from a/b.txt\n", "from a/z.txt\n", "from b.txt\n"]
    assert contents(Text(tmp_path, "*.md", whole_files=True)) == ["from c.md\n"]
    with pytest.raises(DataError, match=r"holds no file named \*\.rst"):
        Text(tmp_path, "*.rst", whole_files=True)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"fine\n\nnot \xff fine", "byte 10 is not UTF-8"),
        (b"fine\n\n" + "é".encode()[:1], "byte 6 is not UTF-8"),
        (b"ab\0cd", "byte 2 is NUL, so this is a binary or UTF-16 file"),
        ("é utf-16".encode("utf-16"), "byte"),
        ("é utf-16".encode("utf-16-le"), "byte"),
        ("latin é".encode("latin-1"), "byte 6 is not UTF-8"),
    ],
)
def test_text_that_is_not_utf8_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        contents(Text(path, whole_files=False))
    assert complaint in one_line(error)
    assert str(path) in one_line(error)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Text(tmp_path / "nothing.txt", whole_files=False)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="is not a regular file"):
        Text(tmp_path / "pipe.txt", whole_files=False)
    with pytest.raises(DataError, match="is not a regular file"):
        Text(tmp_path, whole_files=False)  # the folder holds the pipe


def test_identity_follows_content_and_names_not_places(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("text")
    one = Text(tmp_path / "one" / "a.txt", whole_files=True).identity()
    assert one == Text(tmp_path / "two" / "a.txt", whole_files=True).identity()
    assert one != Text(tmp_path / "one" / "a.txt", whole_files=False).identity()
    (tmp_path / "two" / "a.txt").write_text("tExt")
    assert one != Text(tmp_path / "two" / "a.txt", whole_files=True).identity()


def parquet(path: Path, column: list[object], name: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(column))), name: column})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    parquet(tmp_path / "b.parquet", ["last"])
    parquet(tmp_path / "a.parquet", list(ROWS))
    assert contents(Parquet(tmp_path, text_column="text")) == [*ROWS, "last"]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["x", None])
    with pytest.raises(DataError, match=r"a\.parquet: row 1: field 'text' is NoneType"):
        contents(Parquet(path, text_column="text"))
    with pytest.raises(DataError, match="no column 'body' \\(columns: id, text\\)"):
        contents(Parquet(path, text_column="body"))
    with pytest.raises(DataError, match="row 0: field 'id' is int"):
        contents(Parquet(path, text_column="id"))
    data = parquet(path, [f"row {i}" for i in range(500)]).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged parquet") as error:
        contents(Parquet(path, text_column="text"))
    one_line(error)


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local dataset, read by the same calls as one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        rows = [{"text": f"document {part} {i}", "n": i} for i in range(5)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{part}.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text('{"text": "held out", "n": 0}\n')
    datasets.disable_progress_bars()
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_in_order(hub_folder: Path, streaming: bool) -> None:
    source = HubDataset(str(hub_folder), streaming=streaming)
    expected = [f"document {part} {i}" for part in range(2) for i in range(5)]
    assert contents(source) == expected
    assert contents(source, 7) == expected[7:]
    assert contents(HubDataset(str(hub_folder), split="test", streaming=streaming)) == ["held out"]
    assert source.identity() == HubDataset(str(hub_folder), streaming=not streaming).identity()


def test_what_the_hub_cannot_give_is_named(hub_folder: Path) -> None:
    with pytest.raises(DataError, match="dataset nobody/nothing cannot be loaded") as error:
        HubDataset("nobody/nothing")
    one_line(error)
    with pytest.raises(DataError, match="BuilderConfig 'tiny' not found"):
        HubDataset(str(hub_folder), subset="tiny")
    with pytest.raises(DataError, match=r"fails at row 0 of dev: .*dev"):
        contents(HubDataset(str(hub_folder), split="dev"))
    with pytest.raises(DataError, match="row 0 of train has no field 'body'"):
        contents(HubDataset(str(hub_folder), text_column="body"))
    with pytest.raises(DataError, match="row 0 of train: field 'n' is int"):
        contents(HubDataset(str(hub_folder), text_column="n"))


def test_a_file_written_to_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl_bytes())
    source = Jsonl(path, text_column="text")
    source.identity()
    assert contents(source) == ROWS
    reading = source.documents()
    next(reading)
    with path.open("ab") as stream:
        stream.write(jsonl_bytes())
    message = r"a\.jsonl was written to while it was read; give the same command again"
    with pytest.raises(DataError, match=message):
        list(reading)
    with pytest.raises(DataError, match=message):  # and so before it is hashed, read on
        source.identity()


def test_field_names_are_shown_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a\nb\x1b[1m": 1, "c" * 1000: 2}))
    with pytest.raises(DataError, match=r"\(fields: a\?b\?\[1m, c{40}\)") as error:
        contents(Jsonl(path, text_column="text"))
    one_line(error)
