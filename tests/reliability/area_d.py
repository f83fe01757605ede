"""D1, D4, D5: damaged prepared folders, what checks of ids cost, a huge document.

`area_d_sources.py` is about what folders are made from, `area_d_runs.py` about runs that meet them.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reliability.harness import Trial, bar
from reliability.runs import corpus
from training.conftest import make_documents

from llmnorm.data import PrepareOptions, open_mixture, open_prepared, prepare
from llmnorm.data.manifest import _checksum
from llmnorm.data.sources import Text
from llmnorm.data.tokenizer import check_ids
from llmnorm.durable import sha256_of
from llmnorm.errors import DataError

CUTS = FLIPS = 20
Damage = Callable[[Path, random.Random], Path | str]  # the file that a message must name


def forge(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Make sizes, hashes and checksum of the manifest right again after files were changed."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    files = content["tokenizer"]["files"]
    for split in content["splits"].values():
        files = [
            *files,
            *(s[kind] for s in split["shards"] for kind in ("tokens_file", "docs_file")),
        ]
    for entry in files:
        if (folder / entry["name"]).is_file():
            entry["bytes"] = (folder / entry["name"]).stat().st_size
            entry["sha256"] = sha256_of(folder / entry["name"])
    content["checksum"] = _checksum(content)
    path.write_text(json.dumps(content))


def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def cut(folder: Path, rng: random.Random) -> Path:
    file = _any_file(folder, rng)
    os.truncate(file, rng.randrange(file.stat().st_size))
    return file


def flip(folder: Path, rng: random.Random) -> Path:
    file = _any_file(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


TOKENS, DOCS = "train/tokens-00001.npy", "train/docs-00001.npy"


def _saved(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """The array of a shard saved otherwise, under a manifest that says so."""

    def damage(folder: Path, rng: random.Random) -> Path:
        np.save(folder / name, change(np.load(folder / name)), allow_pickle=True)
        forge(folder)
        return folder / name

    return damage


def _bytes(name: str, change: Callable[[bytes], bytes], *, forged: bool = True) -> Damage:
    def damage(folder: Path, rng: random.Random) -> Path:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if forged:
            forge(folder)
        return folder / name

    return damage


def _instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path, rng: random.Random) -> Path:
        (folder / name).unlink()
        make(folder / name)
        return folder / name

    return damage


def _manifest(change: Callable[[dict[str, Any]], object], names: str = "manifest.json") -> Damage:
    def damage(folder: Path, rng: random.Random) -> Path:
        forge(folder, lambda content: change(content) and None)
        return folder / names

    return damage


def _swapped(folder: Path, rng: random.Random) -> Path:
    other = folder / "train" / "tokens-00000.npy"
    (folder / TOKENS).rename(folder / "away")
    other.rename(folder / TOKENS)
    (folder / "away").rename(other)
    return other


def _foreign(folder: Path, rng: random.Random) -> Path:
    shutil.copy(folder / TOKENS, folder / "train" / "tokens-00077.npy")
    return folder / "train" / "tokens-00077.npy"


def _offset(row: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(docs: np.ndarray) -> np.ndarray:
        docs[row, 0] = value
        return docs

    return change


def _with_id(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(ids: np.ndarray) -> np.ndarray:
        ids[77] = value
        return ids

    return change


OTHERS: dict[str, Damage] = {
    "other byte order": _saved(TOKENS, lambda ids: ids.astype(">u2")),
    "signed": _saved(TOKENS, lambda ids: ids.view("<i2")),
    "half precision": _saved(TOKENS, lambda ids: ids.view("<f2")),
    "wider": _saved(TOKENS, lambda ids: ids.astype("<u4")),
    "a table": _saved(TOKENS, lambda ids: ids[: len(ids) // 2 * 2].reshape(2, -1)),
    "shorter": _saved(TOKENS, lambda ids: ids[:-1]),
    "longer": _saved(TOKENS, lambda ids: np.append(ids, ids[:1])),
    "objects": _saved(TOKENS, lambda ids: np.array([{}] * len(ids), dtype=object)),
    "by columns": _saved(DOCS, np.asfortranarray),
    "narrow documents": _saved(DOCS, lambda docs: docs.astype("<i4")),
    "offset backwards": _saved(DOCS, _offset(2, 0)),
    "offset negative": _saved(DOCS, _offset(1, -5)),
    "offset beyond": _saved(DOCS, _offset(3, 10**9)),
    "id beyond": _saved(TOKENS, _with_id(9_999)),
    "negative id, wrapped": _saved(TOKENS, _with_id(2**16 - 7)),
    "no header": _bytes(TOKENS, lambda data: data[128:]),
    "other magic": _bytes(TOKENS, lambda data: b"\x93NUMPX" + data[6:]),
    "other version": _bytes(TOKENS, lambda data: data[:6] + b"\x09" + data[7:]),
    "header of junk": _bytes(TOKENS, lambda data: data[:10] + b"(" * 118 + data[128:]),
    "more behind": _bytes(TOKENS, lambda data: data + b"\1\0"),
    "more behind, unforged": _bytes(TOKENS, lambda data: data + b"\1\0", forged=False),
    "empty": _bytes(TOKENS, lambda data: b""),
    "missing": _instead(TOKENS, lambda path: None),
    "a pipe": _instead(TOKENS, os.mkfifo),
    "a folder": _instead(TOKENS, Path.mkdir),
    "a link to nothing": _instead(TOKENS, lambda path: path.symlink_to("nowhere")),
    "a device": _instead(TOKENS, lambda path: path.symlink_to("/dev/zero")),
    "swapped": _swapped,
    "foreign shard": _foreign,
    "manifest missing": _instead("manifest.json", lambda path: None),
    "manifest a pipe": _instead("manifest.json", os.mkfifo),
    "manifest deep": _bytes("manifest.json", lambda data: b'{"a":' * 100_000, forged=False),
    "manifest a list": _bytes("manifest.json", lambda data: b"[1]", forged=False),
    "manifest no text": _bytes("manifest.json", lambda data: b"\xff" + data, forged=False),
    "other format": _manifest(lambda content: content.update(format="llmnorm-tokens-0")),
    "other type": _manifest(lambda content: content.update(dtype="uint32"), "train/tokens-00000"),
    "leads out": _manifest(lambda content: content["tokenizer"]["files"][0].update(name="../x")),
    "more tokens": _manifest(lambda content: content["splits"]["train"].update(tokens=9), "train"),
    "no documents": _manifest(lambda content: content["splits"]["val"].update(documents=0)),
    "smaller vocabulary": _manifest(
        lambda content: content["tokenizer"].update(vocab_size=200), "train/tokens-00000"
    ),
}
FOLDERS = [*[("cut", cut)] * CUTS, *[("flipped", flip)] * FLIPS, *OTHERS.items()]


def content(folder: Path) -> dict[str, list[list[int]]]:
    """Open a folder as a run does and read all there is in it."""
    data = open_mixture([(folder, 1.0)])
    found = {}
    for split in (*data.train(), open_prepared(folder, verify=False).split("val")):
        stream = split.window(0, split.tokens).tolist()
        documents = [split.document(i).tolist() for i in range(split.documents)]
        assert [token for document in documents for token in document] == stream
        found[split.name] = documents
    return found


def intact(folder: Path) -> tuple[Path, dict[str, list[list[int]]]]:
    """The corpus and what is in it."""
    return corpus(), content(corpus())


def check_line(message: str, name: Path | str) -> None:
    """One printable line that names the file."""
    assert message.isprintable(), repr(message)
    assert len(message) <= 400, message
    assert str(name) in message, f"{name} is not in: {message}"


@bar(
    "D1",
    "damaged prepared folders: cuts, flips, types, headers, offsets, ids, manifests",
    total=len(FOLDERS),
    ci=len(FOLDERS),
    prepare=intact,
)
def a_damaged_folder_is_named_or_read_right(trial: Trial) -> None:
    name, damage = FOLDERS[trial.index]
    trial.note(name if name in ("cut", "flipped") else "made otherwise")
    original, expected = trial.shared
    folder = Path(shutil.copytree(original, trial.folder / "data"))
    file = damage(folder, trial.rng)
    try:
        found = content(folder)
    except DataError as error:
        check_line(str(error), folder if Path(file).name == "manifest.json" else file)
    else:
        assert found == expected, "other tokens were read in silence"
        raise AssertionError(f"{name}: not noticed")


@bar("D4", "checking ids costs at most 1 % of a step", total=3, ci=1, prepare=intact)
def checking_ids_is_cheap(trial: Trial) -> None:
    from llmnorm.build import build_config, build_model

    config = build_config("debug", vocab_size=300)
    model, rows = build_model(config), np.random.default_rng(0).integers(0, 300, (4, 256))
    inputs, narrow = torch.from_numpy(rows), rows.astype(np.uint16)

    def step() -> None:
        model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()

    def check() -> None:
        for row in narrow:
            check_ids(row, 300, "a row")

    assert fastest(check) <= 0.01 * fastest(step)


def fastest(work: Callable[[], None]) -> float:
    """Seconds of the fastest of several goes, after one to warm up."""
    work()
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


@bar("D5", "a document of 50 MB among small ones", total=1, ci=0, seconds=600, prepare=intact)
def a_huge_document_is_kept_whole(trial: Trial) -> None:
    words = make_documents(2000, seed=5).split()
    huge = " ".join(trial.rng.choices(words, k=50_000_000 // 5))[:50_000_000]
    texts = ["small", huge, "small too"]
    path = trial.folder / "a.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    options = PrepareOptions(tokenizer=str(trial.shared[0]), val_fraction=0.5)
    prepared = prepare(Text(path, whole_files=False), trial.folder / "out", options)
    splits = [prepared.split(name) for name in prepared.manifest.splits]
    found = [split.document(i)[1:] for split in splits for i in range(split.documents)]
    assert sum(len(ids) + 1 for ids in found) == sum(split.tokens for split in splits)
    tokenizer = prepared.tokenizer()
    assert sorted(map(tokenizer.decode, found), key=len) == sorted(texts, key=len)
