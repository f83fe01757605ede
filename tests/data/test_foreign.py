"""Tokens of nanoGPT, llm.c, Megatron and OLMo become the same documents as the text they hold."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.foreign import Megatron, NanoGpt, Olmo, TokenSource
from llmnorm.errors import ConfigError, DataError

from .conftest import make_documents

pytestmark = pytest.mark.fast
EOS = 0
VOCAB = 300


@pytest.fixture
def documents(prepared: Prepared) -> list[list[int]]:
    tokenizer = prepared.tokenizer()
    return [tokenizer(text).input_ids for text in make_documents(40, seed=2)]


def stream(documents: list[list[int]], *, before: bool = False) -> list[int]:
    """Documents in a row, end-of-text after each, or before."""
    parts = [[EOS, *ids] if before else [*ids, EOS] for ids in documents]
    return [token for part in parts for token in part]


def found(source: TokenSource) -> list[list[int]]:
    return [document.content.tolist() for document in source.documents()]  # type: ignore[union-attr]


def nanogpt(path: Path, dtype: str | None = None) -> NanoGpt:
    return NanoGpt(path, eos_token_id=EOS, vocab_size=VOCAB, dtype=dtype)


def olmo(path: Path, dtype: str | None = None) -> Olmo:
    return Olmo(path, eos_token_id=EOS, vocab_size=VOCAB, dtype=dtype)


def megatron(path: Path) -> Megatron:
    return Megatron(path, eos_token_id=EOS, vocab_size=VOCAB)


def write_llmc(path: Path, tokens: list[int], magic: int = 20240520, dtype: str = "<u2") -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())


def write_megatron(prefix: Path, documents: list[list[int]], dtype: str, code: int) -> None:
    """Two sequences a document where it has more than one token, with end-of-text at its end."""
    sequences, borders = [], [0]
    for ids in documents:
        whole = [*ids, EOS]
        parts = [whole[:1], whole[1:]] if len(whole) > 2 else [whole]
        sequences += parts
        borders.append(len(sequences))
    lengths = np.array([len(sequence) for sequence in sequences])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    body = np.array([token for sequence in sequences for token in sequence], dtype)
    prefix.with_name(prefix.name + ".bin").write_bytes(body.tobytes())
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
        + lengths.astype("<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(borders, "<i8").tobytes()
    )


def test_nanogpt_bin(tmp_path: Path, documents: list[list[int]]) -> None:
    np.array(stream(documents), "<u2").tofile(tmp_path / "train.bin")
    assert found(nanogpt(tmp_path / "train.bin")) == documents


def test_llmc_bin_with_either_header(tmp_path: Path, documents: list[list[int]]) -> None:
    write_llmc(tmp_path / "a.bin", stream(documents, before=True))
    assert found(nanogpt(tmp_path / "a.bin")) == documents
    write_llmc(tmp_path / "b.bin", stream(documents, before=True), 20240801, "<u4")
    assert found(nanogpt(tmp_path / "b.bin")) == documents


def test_olmo_npy_bare_and_real(tmp_path: Path, documents: list[list[int]]) -> None:
    np.array(stream(documents), "<u2").tofile(tmp_path / "a.npy")
    assert found(olmo(tmp_path / "a.npy")) == documents
    np.array(stream(documents), "<u4").tofile(tmp_path / "b.npy")
    assert found(olmo(tmp_path / "b.npy", "uint32")) == documents
    np.save(tmp_path / "c.npy", np.array(stream(documents), "<u4"))
    assert found(olmo(tmp_path / "c.npy")) == documents


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5)])
def test_megatron_pair(tmp_path: Path, documents: list[list[int]], dtype: str, code: int) -> None:
    write_megatron(tmp_path / "corpus_text_document", documents, dtype, code)
    for name in ("corpus_text_document", "corpus_text_document.bin", "corpus_text_document.idx"):
        assert found(megatron(tmp_path / name)) == documents
    assert found(megatron(tmp_path)) == documents


def test_documents_longer_than_a_chunk_stay_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmnorm.data.foreign._CHUNK", 7)
    documents = [[1, 2, 3], list(range(1, 50)), [4], [5] * 7, [6] * 8]
    np.array(stream(documents), "<u2").tofile(tmp_path / "a.bin")
    assert found(nanogpt(tmp_path / "a.bin")) == documents


def test_prepared_tokens_equal_prepared_text(
    tmp_path: Path, prepared: Prepared, documents: list[list[int]]
) -> None:
    empty_too = [documents[0], [], *documents[1:]]
    np.array(stream(empty_too), "<u2").tofile(tmp_path / "a.bin")
    options = PrepareOptions(tokenizer=str(prepared.path), val_fraction=0.1)
    made = prepare(nanogpt(tmp_path / "a.bin"), tmp_path / "out", options)
    assert made.manifest.skipped_documents == 1
    texts = make_documents(40, seed=2)
    total = sum(made.split(name).utf8_bytes for name in ("train", "val"))
    assert total == sum(len(text.encode()) for text in texts)
    assert made.split("val").document(0).tolist() == [EOS, *documents[0]]


def test_splits_named_by_files_are_kept(
    tmp_path: Path, prepared: Prepared, documents: list[list[int]]
) -> None:
    (tmp_path / "in").mkdir()
    np.array(stream(documents[:30]), "<u2").tofile(tmp_path / "in" / "train.bin")
    np.array(stream(documents[30:]), "<u2").tofile(tmp_path / "in" / "val.bin")
    options = PrepareOptions(tokenizer=str(prepared.path))
    made = prepare(nanogpt(tmp_path / "in"), tmp_path / "out", options)
    val = made.split("val")
    kept = [val.document(i)[1:].tolist() for i in range(val.documents)]
    assert kept == documents[30:]
    assert made.split("train").documents == 30


def test_tokens_without_their_tokenizer_are_refused(tmp_path: Path) -> None:
    np.array([1, 2, 0], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="holds token ids: give their --tokenizer"):
        prepare(nanogpt(tmp_path / "a.bin"), tmp_path / "out", PrepareOptions())


def test_ids_of_another_tokenizer_are_named_with_their_place(tmp_path: Path) -> None:
    tokens = np.full(2000, 5, "<u2")
    tokens[1234] = VOCAB
    tokens.tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin from byte 0: token 1234 has id 300, beyond"):
        found(nanogpt(tmp_path / "a.bin"))
    tokens.astype(">u2").tofile(tmp_path / "big-endian.bin")
    with pytest.raises(DataError, match="beyond the vocabulary"):
        found(nanogpt(tmp_path / "big-endian.bin"))
    negative = np.array([[3, -7, 0]], "<i4").tolist()
    write_megatron(tmp_path / "m", negative, "<i4", 4)
    with pytest.raises(DataError, match="token 1 has id -7"):
        found(megatron(tmp_path / "m"))


def test_the_wrong_token_type_is_noticed(tmp_path: Path, documents: list[list[int]]) -> None:
    tokens = np.array(stream(documents))
    tokens.astype("<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(DataError, match="32-bit tokens; pass --token-dtype uint32"):
        found(nanogpt(tmp_path / "wide.bin"))
    assert found(nanogpt(tmp_path / "wide.bin", "uint32")) == documents
    tokens[: len(tokens) // 2 * 2].astype("<u2").tofile(tmp_path / "narrow.bin")
    with pytest.raises(DataError, match="beyond the vocabulary"):
        found(nanogpt(tmp_path / "narrow.bin", "uint32"))
    np.save(tmp_path / "float.npy", np.ones(4))
    with pytest.raises(DataError, match="expected one row of integers"):
        found(olmo(tmp_path / "float.npy"))


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_cut_off_token_files_are_noticed(
    tmp_path: Path, documents: list[list[int]], cut: int
) -> None:
    def shorten(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-cut])

    tokens = stream(documents)
    write_llmc(tmp_path / "c.bin", tokens)
    shorten(tmp_path / "c.bin")
    with pytest.raises(DataError, match=r"c\.bin has \d+ bytes of tokens after byte 1024"):
        found(nanogpt(tmp_path / "c.bin"))
    np.save(tmp_path / "d.npy", np.array(tokens, "<u2"))
    shorten(tmp_path / "d.npy")
    with pytest.raises(DataError, match="not a readable"):
        found(olmo(tmp_path / "d.npy"))
    for part, complaint in (("idx", "its header promises"), ("bin", "ends at byte|cut off")):
        write_megatron(tmp_path / part, documents, "<u2", 8)
        shorten(tmp_path / f"{part}.{part}")
        with pytest.raises(DataError, match=complaint):
            found(megatron(tmp_path / part))
    if cut % 2:
        np.array(tokens, "<u2").tofile(tmp_path / "raw.bin")
        shorten(tmp_path / "raw.bin")
        with pytest.raises(DataError, match=r"raw\.bin: \d+ bytes are no whole number"):
            found(nanogpt(tmp_path / "raw.bin"))


def test_what_is_not_a_megatron_pair_is_named(tmp_path: Path, documents: list[list[int]]) -> None:
    write_megatron(tmp_path / "m", documents, "<u2", 8)
    index = tmp_path / "m.idx"
    good = index.read_bytes()
    index.write_bytes(b"TNTIDX\x00\x00" + good[8:])
    with pytest.raises(DataError, match="expected MMIDIDX"):
        found(megatron(tmp_path / "m"))
    index.write_bytes(good[:17] + b"\x07" + good[18:])
    with pytest.raises(DataError, match="version 1, token type 7"):
        found(megatron(tmp_path / "m"))
    index.unlink()
    with pytest.raises(DataError, match=r"m\.idx is missing"):
        megatron(tmp_path / "m.bin").identity()


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (34, struct.pack("<i", -1), "do not lie one after another"),  # the first length
        (34, struct.pack("<i", 10**6), "do not lie one after another"),
        (-8, struct.pack("<q", 1), "do not go from 0 to its"),  # the last border
        (-8, struct.pack("<q", 2**60), "do not go from 0 to its"),
        (-16, struct.pack("<q", -3), "do not go from 0 to its"),
    ],
)
def test_a_damaged_megatron_index_is_named(
    tmp_path: Path, documents: list[list[int]], place: int, value: bytes, complaint: str
) -> None:
    write_megatron(tmp_path / "m", documents, "<u2", 8)
    index = tmp_path / "m.idx"
    data = bytearray(index.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    index.write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        found(megatron(tmp_path / "m"))


def test_tokens_beyond_what_the_index_describes_are_refused(
    tmp_path: Path, documents: list[list[int]]
) -> None:
    write_megatron(tmp_path / "m", documents, "<u2", 8)
    with (tmp_path / "m.bin").open("ab") as body:
        body.write(b"\1\0")
    with pytest.raises(DataError, match="the pair does not match"):
        found(megatron(tmp_path / "m"))


def test_ids_that_may_have_been_cut_to_16_bits_are_refused(tmp_path: Path) -> None:
    write_llmc(tmp_path / "a.bin", [1, 2, 65_537 % 65_536, 0])
    source = NanoGpt(tmp_path / "a.bin", eos_token_id=0, vocab_size=70_000)
    with pytest.raises(DataError, match=r"a\.bin holds uint16, which cannot number"):
        found(source)
    assert found(NanoGpt(tmp_path / "a.bin", eos_token_id=0, vocab_size=1 << 16)) == [[1, 2, 1]]


@pytest.mark.parametrize("keep", [1000, 2002])
def test_a_token_file_cut_while_it_is_read_is_an_error_and_no_crash(
    tmp_path: Path, keep: int
) -> None:
    path = tmp_path / "a.bin"
    np.array([5] * 1000 + [0] + [6] * 200_000, "<u2").tofile(path)
    reading = nanogpt(path).documents()
    assert len(next(reading).content) == 1000
    os.truncate(path, keep)
    with pytest.raises(DataError, match=rf"a\.bin ends at byte {keep}; it was cut off while"):
        list(reading)
