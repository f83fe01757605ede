"""D3: made source files, each prepared by the command line: refused with its place, or kept whole.

A case is kept when every document comes back letter by letter, and what has no text is counted.
"""

import gzip
import json
import lzma
import os
import re
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from reliability.console import check_refusal, llmnorm
from reliability.harness import Trial, bar
from reliability.runs import corpus

from llmnorm.data import open_prepared

EOS = 0
Make = Callable[[Path], Path]  # in an empty folder; what --path names


@dataclass(frozen=True)
class Case:
    """A made source; `refused` is what the one line must say, else `texts` are its documents."""

    name: str
    source: str
    make: Make
    refused: str | None = None
    texts: tuple[str, ...] = ()
    skipped: int = 0
    tokenizer: str | None = None  # in the folder of the source; None is the corpus' own


def holding(name: str, data: bytes) -> Make:
    """A single file."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def rows(*texts: str) -> bytes:
    """JSON lines, as an honest tool writes them."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


BAD_UTF8 = {
    "lone continuation": b"\x80",
    "two bytes cut": b"\xc3 ",
    "three bytes cut": b"\xe2\x82 ",
    "four bytes cut": b"\xf0\x9f\x98 ",
    "overlong slash": b"\xc0\xaf",
    "overlong NUL": b"\xe0\x80\x80",
    "surrogate": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "never in UTF-8": b"\xfe\xff",
}
TWO = ("first text", "second text")


def utf8_cases() -> list[Case]:
    cases = []
    for kind, bad in BAD_UTF8.items():
        text = b"fine\n\nbad " + bad + b" end\n"
        line = b'{"text": "fine"}\n{"text": "' + bad + b' end"}\n'
        for source, name, data in (("text", "a.txt", text), ("jsonl", "a.jsonl", line)):
            place = rf"{name}: byte {data.index(bad)} is not UTF-8"
            cases.append(Case(f"{kind} in {source}", source, holding(name, data), place))
    for code in ("utf-16", "utf-16-le", "utf-32"):
        data = "two words\n\nmore".encode(code)
        cases.append(Case(code, "text", holding("a.txt", data), r"a\.txt: byte \d+ is"))
    return cases


def text_cases() -> list[Case]:
    def kept(name: str, data: bytes, *texts: str) -> Case:
        return Case(name, "text", holding("a.txt", data), texts=texts)

    end = "<|endoftext|>"
    return [
        Case("NUL", "text", holding("a.txt", b"ab\n\nc\0d\n"), r"a\.txt: byte 5 is NUL"),
        Case("empty file", "text", holding("a.txt", b""), "no text for the"),
        Case("blank lines alone", "text", holding("a.txt", b"\n \n\t\n"), "no text for the"),
        kept("byte order mark", b"\xef\xbb\xbfone\n\ntwo\n", "one", "two"),
        kept("byte order mark within", "one\n\n\ufefftwo\n".encode(), "one", "\ufefftwo"),
        kept("CRLF", b"one\r\nmore\r\n\r\ntwo\r\n", "one\nmore", "two"),
        kept("lone CR", b"one\rmore\n\ntwo", "one\rmore", "two"),
        kept("other line ends", "a\u2028b\x85c\n\nd\x0be".encode(), "a\u2028b\x85c", "d\x0be"),
        kept("one letter each", b"\n\n".join([b"a"] * 40), *["a"] * 40),
        kept("end-of-text written out", f"{end}\n\n{end}{end}".encode(), end, end + end),
        kept("no line end", b"one\n\ntwo", "one", "two"),
        kept("private characters", "\ue000\n\n\U0010fffd".encode(), "\ue000", "\U0010fffd"),
        kept("a line of a million", b"x y " * 250_000 + b"\n\nend", "x y " * 250_000, "end"),
    ]


def json_cases() -> list[Case]:
    bad = {
        "cut object": (b'{"text": "a"', "line 2 .byte 14. is not JSON"),
        "trailing comma": (b'{"text": "a",}', "line 2 .byte 14. is not JSON"),
        "single quotes": (b"{'text': 'a'}", "line 2 .byte 14. is not JSON"),
        "two objects": (b'{"text": "a"} {"text": "b"}', "line 2 .byte 14. is not JSON"),
        "raw control character": (b'{"text": "a\tb"}', "line 2 .byte 14. is not JSON"),
        "bare word": (b"hello", "line 2 .byte 14. is not JSON"),
        "long number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 2 .byte 14."),
        "list": (b'["a"]', "line 2 .byte 14. is a JSON list"),
        "null": (b"null", "line 2 .byte 14. is a JSON NoneType"),
        "missing field": (b'{"txt\\n": "a"}', "line 2 .byte 14. has no field 'text'"),
        "number": (b'{"text": 7}', "field 'text' is int"),
        "null field": (b'{"text": null}', "field 'text' is NoneType"),
        "list field": (b'{"text": ["a"]}', "field 'text' is list"),
        "object field": (b'{"text": {"a": 1}}', "field 'text' is dict"),
        "deep lists": (b"[" * 200_000, "line 2 .byte 14. is JSON nested too deeply"),
        "deep objects": (b'{"a":' * 200_000, "line 2 .byte 14. is JSON nested too deeply"),
        "high surrogate": (b'{"text": "a\\ud800"}', "line 2 .byte 14..*half a surrogate pair"),
        "low surrogate": (b'{"text": "\\udc00 a"}', "line 2 .byte 14..*half a surrogate pair"),
        "pair turned round": (b'{"text": "\\ude00\\ud83d"}', "half a surrogate pair"),
    }
    before = b'{"text": "x"}\n'
    cases = [
        Case(name, "jsonl", holding("a.jsonl", before + line + b"\n"), rf"a\.jsonl: .*{said}")
        for name, (line, said) in bad.items()
    ]

    def kept(name: str, data: bytes, *texts: str, skipped: int = 0) -> Case:
        return Case(name, "jsonl", holding("a.jsonl", data), texts=texts, skipped=skipped)

    return [
        *cases,
        kept("surrogate pair", b'{"text": "\\ud83d\\ude00"}\n' + rows("b"), "\U0001f600", "b"),
        kept("NUL in JSON", rows("a\0b", "c"), "a\0b", "c"),
        kept("CRLF in JSON", rows("a\r\nb", "c").replace(b"\n", b"\r\n"), "a\r\nb", "c"),
        kept("mark before JSON", b"\xef\xbb\xbf" + rows(*TWO), *TWO),
        kept("some documents empty", rows("", "one", "", "two", ""), "one", "two", skipped=3),
        kept("spaces alone", rows(" ", "\n\n", "a"), " ", "\n\n", "a"),
        Case("all empty", "jsonl", holding("a.jsonl", rows("", "", "")), "3 of them empty"),
        Case("no rows", "jsonl", holding("a.jsonl", b"\n\n"), "no text for the"),
    ]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def compressed_cases() -> list[Case]:
    cases = []
    whole = rows(*(f"document {i} of some" for i in range(300)))
    for ending, compress in COMPRESS.items():
        data, name = compress(whole), f"a.jsonl.{ending}"
        said = rf"a\.jsonl\.{ending}: (compressed data is damaged or cut off after|line \d+ )"
        for share in (0.1, 0.5, 0.99):
            make = holding(name, data[: int(len(data) * share)])
            cases.append(Case(f"{ending} cut at {share}", "jsonl", make, said))
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x55
        cases.append(Case(f"{ending} flipped", "jsonl", holding(name, bytes(flipped)), said))
        cases.append(Case(f"{ending} by name only", "jsonl", holding(name, whole), said))
    return cases


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.txt")
    return folder / "a.txt"


def _socket(folder: Path) -> Path:
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket must be short
    socket.socket(socket.AF_UNIX).bind("a.txt")
    os.chdir(here)
    return folder / "a.txt"


def _pipe_in_folder(folder: Path) -> Path:
    (folder / "b.txt").write_text("fine\n")
    _fifo(folder)
    return folder


def _dangling(folder: Path) -> Path:
    (folder / "a.txt").symlink_to("nowhere")
    return folder


def _folder_as_file(folder: Path) -> Path:
    (folder / "a.txt").mkdir()
    return folder / "a.txt"


def file_cases() -> list[Case]:
    return [
        Case("pipe", "text", _fifo, r"a\.txt is not a regular file"),
        Case("socket", "text", _socket, r"a\.txt is not a regular file"),
        Case("pipe in a folder", "text", _pipe_in_folder, r"a\.txt is not a regular file"),
        Case("link to nothing", "text", _dangling, r"a\.txt cannot be read"),
        Case("folder as file", "text", _folder_as_file, r"a\.txt holds no file named"),
        Case("device", "text", lambda folder: Path("/dev/zero"), "is not a regular file"),
        Case("nothing", "text", lambda folder: folder / "no.txt", "does not exist"),
    ]


def _parquet(column: list[object], name: str = "text", keep: float = 1.0) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({name: column}), path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return path

    return make


def parquet_cases() -> list[Case]:
    return [
        Case("parquet", "parquet", _parquet([*TWO]), texts=TWO),
        Case("parquet null", "parquet", _parquet(["a", None]), r"a\.parquet: row 1: field"),
        Case("parquet column", "parquet", _parquet(["a"], "body"), "has no column 'text'"),
        Case("parquet cut", "parquet", _parquet([*TWO], keep=0.6), "damaged parquet"),
        Case("no parquet", "parquet", holding("a.parquet", rows(*TWO)), "damaged parquet"),
    ]


# Token 0 is end-of-text and 1..256 stand for the 256 bytes in the corpus' tokenizer.
IDS = [EOS, 40, 41, 42, EOS, 50, 51, EOS]


def tokens(dtype: str, ids: list[int] = IDS) -> bytes:
    return np.array(ids, dtype).tobytes()


def _npy(array: np.ndarray, extra: bytes = b"") -> Make:
    def make(folder: Path) -> Path:
        np.save(folder / "a.npy", array, allow_pickle=True)
        with (folder / "a.npy").open("ab") as stream:
            stream.write(extra)
        return folder / "a.npy"

    return make


def _llmc(count: int) -> bytes:
    return np.array([20240520, 1, count] + [0] * 253, "<i4").tobytes() + tokens("<u2")


def _megatron(
    body: bytes, code: int = 8, cut: int | None = None, magic: bytes = b"MMIDIDX"
) -> Make:
    lengths, borders = [4, 3], [0, 1, 2]
    index = magic + b"\0\0" + struct.pack("<QBQQ", 1, code, 2, 3)
    size = {8: 2, 4: 4}[code]
    index += np.array(lengths, "<i4").tobytes() + np.array([0, 4 * size], "<i8").tobytes()
    index += np.array(borders, "<i8").tobytes()

    def make(folder: Path) -> Path:
        (folder / "a.bin").write_bytes(body)
        (folder / "a.idx").write_bytes(index[:cut])
        return folder / "a.bin"

    return make


def _word_tokenizer(folder: Path) -> Path:
    """70,000 words: ids that 16 bits cannot hold."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70_000)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return holding("a.bin", _llmc(len(IDS)))(folder)


def token_cases() -> list[Case]:
    def case(name: str, source: str, make: Make, refused: str) -> Case:
        return Case(name, source, make, refused)

    beyond, negative = [EOS, 5, 9_999, EOS], [EOS, 5, -7, EOS]
    pair = tokens("<u2", IDS[1:])
    return [
        case("id beyond", "nanogpt", holding("a.bin", tokens("<u2", beyond)), "has id 9999"),
        case("turned bytes", "nanogpt", holding("a.bin", tokens(">u2")), "beyond the vocabulary"),
        case("odd size", "nanogpt", holding("a.bin", tokens("<u2")[:-1]), "cut off at byte 15"),
        case("llm.c cut", "nanogpt", holding("a.bin", _llmc(99)), "after byte 1024, its header"),
        case("32 bits", "nanogpt", holding("a.bin", tokens("<u4", IDS * 20)), "are 32-bit tokens"),
        Case("too large", "nanogpt", _word_tokenizer, "uint16, which", tokenizer="tokenizer.json"),
        case("negative", "olmo", _npy(np.array(negative, "<i4")), "has id -7"),
        case("numbers with a point", "olmo", _npy(np.ones(9)), "expected one row of integers"),
        case("objects", "olmo", _npy(np.array([{}, 1], object)), "not a readable .npy"),
        case("a table", "olmo", _npy(np.ones((2, 2), "<u2")), "expected one row of integers"),
        case("more than the header", "olmo", _npy(np.array(IDS, "<u2"), b"\1\0"), "cut off or da"),
        case(
            "megatron id", "megatron", _megatron(tokens("<i4", [5, -7, 1, 0, 5, 1, 0]), 4), "id -7"
        ),
        case("megatron body", "megatron", _megatron(pair[:-2]), "the pair does not match"),
        case("megatron more", "megatron", _megatron(pair + b"\1\0"), "the pair does not match"),
        case("megatron index", "megatron", _megatron(pair, cut=-3), "its header promises"),
        case("megatron magic", "megatron", _megatron(pair, magic=b"TNTIDXX"), "expected MMIDIDX"),
    ]


CASES = [
    *utf8_cases(),
    *text_cases(),
    *json_cases(),
    *compressed_cases(),
    *file_cases(),
    *parquet_cases(),
    *token_cases(),
]


@bar(
    "D3",
    "made source files: a line with the place, or every letter kept and skips counted",
    total=len(CASES),
    ci=len(CASES),
    prepare=lambda folder: corpus(),
)
def a_made_source_is_refused_or_kept_whole(trial: Trial) -> None:
    case = CASES[trial.index]
    trial.note(case.source)
    sys.stderr.write(f"{case.name}\n")
    (trial.folder / "in").mkdir()
    path, out = case.make(trial.folder / "in"), trial.folder / "out"
    tokenizer = path.with_name(case.tokenizer) if case.tokenizer else trial.shared
    words = ["--source", case.source, "--path", path, "--out", out, "--tokenizer", tokenizer]
    said = llmnorm(trial.folder, "data", "prepare", *words)
    if case.refused is not None:
        check_refusal(said, (4,))
        (line,) = said.lines
        assert re.search(case.refused, line), line
        assert not out.exists()
        return
    assert said.code == 0, said.err
    prepared = open_prepared(out)
    found = []
    for split in map(prepared.split, prepared.manifest.splits):
        assert len(split.window(0, split.tokens)) == split.tokens
        documents = [split.document(i) for i in range(split.documents)]
        assert sum(map(len, documents)) == split.tokens
        assert all(document[0] == prepared.eos_token_id for document in documents)
        found += prepared.tokenizer().batch_decode([document[1:] for document in documents])
    assert sorted(found) == sorted(case.texts)
    assert prepared.manifest.skipped_documents == case.skipped
    counted = f"{case.skipped} documents without text"
    assert (counted in said.err) == (counted in said.out) == (case.skipped > 0)
