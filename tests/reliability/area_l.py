"""L1-L3: files made to run code, to exhaust the machine, or to lead out of their folder."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reliability.console import Said, check_refusal, llmnorm
from reliability.harness import Trial, bar
from reliability.hostile import (
    PICKLES,
    Canary,
    check_ended,
    safetensors,
    sign_checkpoint,
    sign_data,
    walls,
    with_header,
)
from reliability.runs import corpus, run, tiny, words

_FAST = 5.0  # seconds for a refusal, imports included


@dataclass(frozen=True)
class Victim:
    """Copies of what a user has: a finished run, prepared data, a folder of texts."""

    run: Path
    data: Path
    texts: Path

    @property
    def model(self) -> Path:
        return self.run / "final"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "step_00000002"


def finished_run(folder: Path) -> Path:
    """A run of four steps, finished."""
    config = tiny(folder / "run", training__max_steps=4, checkpoint__interval_steps=2)
    assert run(config) == 0
    return folder / "run"


def victim(trial: Trial) -> Victim:
    """Fresh copies for a trial to spoil."""
    own = Victim(trial.folder / "victim", trial.folder / "data", trial.folder / "texts")
    shutil.copytree(trial.shared, own.run)
    shutil.copytree(corpus(), own.data)
    own.texts.mkdir()
    return own


Reader = Callable[[Trial, Victim, Path], Said]


def _train(trial: Trial, **changes: object) -> Said:
    given = {"training__max_steps": 1, "eval__max_documents": 1, **changes}
    return llmnorm(trial.folder, "train", *words(trial.folder / "new", **given))


def _evaluate(trial: Trial, own: Victim, file: Path) -> Said:
    options = ("--data", corpus(), "--max-documents", 2, "--seq-len", 32)
    return llmnorm(trial.folder, "eval", "perplexity", "--model", own.model, *options)


def _init(trial: Trial, own: Victim, file: Path) -> Said:
    return _train(trial, training__init_from=str(own.model))


def _resume(trial: Trial, own: Victim, file: Path) -> Said:
    if file.name != "manifest.json":
        sign_checkpoint(own.checkpoint)
    return _train(trial, checkpoint__resume=str(own.checkpoint), training__max_steps=4)


def _continue(trial: Trial, own: Victim, file: Path) -> Said:
    shutil.rmtree(own.model)
    shutil.move(own.run, trial.folder / "new")
    return _train(trial, training__max_steps=4, checkpoint__interval_steps=2)


def _read_data(trial: Trial, own: Victim, file: Path) -> Said:
    if file.name != "manifest.json":
        sign_data(own.data)
    return _train(trial, data__path=str(own.data))


def _prepare(kind: str, *options: object) -> Reader:
    def read(trial: Trial, own: Victim, file: Path) -> Said:
        given = ("--source", kind, "--path", own.texts, "--out", trial.folder / "out")
        return llmnorm(trial.folder, "data", "prepare", *given, *options)

    return read


def _tokens(kind: str) -> Reader:
    return _prepare(kind, "--tokenizer", corpus())


def _tokenizer(trial: Trial, own: Victim, file: Path) -> Said:
    (own.texts / "a.txt").write_text("some words\n\nmore words\n\nand more\n" * 50)
    return _prepare("text", "--tokenizer", own.model)(trial, own, file)


def _preset(trial: Trial, own: Victim, file: Path) -> Said:
    return _train(trial, model__preset=str(own.model), model__overrides={})


PLACES: list[tuple[Reader, str]] = [
    *((_evaluate, f"victim/final/{name}") for name in (
        "model.safetensors", "pytorch_model.bin", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_model.bin",
        "training_args.bin", "optimizer.pt", ".metadata", "model.safetensors.index.json",
        "shard-00000-model-00001-of-00001.safetensors", "chat_template.json",
    )),
    *((_evaluate, f"victim/{name}") for name in ("config.yaml", "environment.json")),
    *((_init, f"victim/final/{name}") for name in (
        "model.safetensors", "extra.safetensors", "config.json", "pytorch_model.bin",
    )),
    *((_resume, f"victim/checkpoints/step_00000002/{name}") for name in (
        "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors",
        "rng-00000.safetensors", "state.json", "manifest.json", "scheduler.pt",
    )),
    *((_continue, f"victim/{name}") for name in (
        "config.yaml", "environment.json", "metrics.jsonl", "exit.json", "rng_state.pth",
    )),
    *((_read_data, f"data/{name}") for name in (
        "train/tokens-00000.npy", "train/docs-00000.npy", "tokenizer.json",
        "tokenizer_config.json", "manifest.json",
    )),
    *((_prepare(kind), f"texts/{name}") for kind, name in (
        ("text", "a.txt"), ("text", "a.txt.gz"), ("text", "a.txt.xz"), ("jsonl", "a.jsonl"),
        ("parquet", "a.parquet"),
    )),
    *((_tokens(kind), f"texts/{name}") for kind, name in (
        ("olmo", "a.npy"), ("nanogpt", "a.bin"), ("megatron", "a.bin"),
    )),
    *((_tokenizer, f"victim/final/{name}") for name in ("tokenizer.json", "config.json")),
    (_preset, "victim/final/config.json"),
]  # fmt: skip


@bar("L1", "a pickle in every file that is read: none is opened",
     total=len(PLACES) * len(PICKLES), ci=48, seconds=60, prepare=finished_run)  # fmt: skip
def pickles(trial: Trial) -> None:
    place, kind = divmod(trial.index, len(PICKLES))
    read, name = PLACES[place]
    canary, own = trial.folder / "canary", victim(trial)
    file = trial.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(list(PICKLES.values())[kind](Canary(canary)))
    if name.endswith("megatron/a.bin"):
        file.with_suffix(".idx").write_bytes(file.read_bytes())
    if name.endswith("final/pytorch_model.bin"):
        (own.model / "model.safetensors").unlink()  # so that it would be read
    if name.endswith("index.json"):
        (own.model / "model.safetensors").unlink()
    with walls(canary):
        check_ended(read(trial, own, file), may_pass=True)


def _tensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(file)


def _with_tensor(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], bytes]:
    """One tensor of the file changed."""

    def make(file: Path) -> bytes:
        tensors = _tensors(file)
        name = max(tensors, key=lambda key: (tensors[key].ndim, key))
        return safetensors({**tensors, name: change(tensors[name])})

    return make


def _entry(*offsets: int, **changes: object) -> str:
    return json.dumps({"dtype": "F32", "shape": [2], "data_offsets": list(offsets), **changes})


_MANY = 2**20


def _many_names(count: int) -> bytes:
    entries = (f'"x{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return with_header("{" + ",".join(entries) + "}")


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda file: b"",
    "seven bytes": lambda file: b"\x02\0\0\0\0\0\0",
    "length 2**63": lambda file: with_header("{}", length=2**63),
    "length 2**64 - 1": lambda file: with_header("{}", length=2**64 - 1),
    "length past the end": lambda file: with_header("{}", length=3),
    "header of 17 MB": lambda file: with_header("{" + " " * 17 * _MANY + "}"),
    "header of 100 MB": lambda file: with_header("{" + " " * 100 * _MANY + "}"),
    "1.4 million names": lambda file: _many_names(1_400_000),
    "200,000 names": lambda file: _many_names(200_000),
    "nested 100,000 deep": lambda file: with_header("[" * 100_000),
    "nested metadata": lambda file: with_header('{"__metadata__":' + '{"a":' * 50_000),
    "not JSON": lambda file: with_header("\0\1\2\3"),
    "a list": lambda file: with_header("[1]"),
    "a name twice": lambda file: with_header(
        '{"a":' + _entry(0, 8) + ',"a":' + _entry(0, 8) + "}", bytes(8)
    ),
    "hole": lambda file: with_header('{"a":' + _entry(8, 16) + "}", bytes(16)),
    "overlap": lambda file: with_header(
        '{"a":' + _entry(0, 8) + ',"b":' + _entry(4, 12) + "}", bytes(12)
    ),
    "trailing bytes": lambda file: file.read_bytes() + bytes(100),
    "cut off": lambda file: file.read_bytes()[:-4],
    "offsets backwards": lambda file: with_header('{"a":' + _entry(8, 0) + "}", bytes(8)),
    "offset overflow": lambda file: with_header('{"a":' + _entry(0, 2**64 - 1) + "}", bytes(8)),
    "huge shape": lambda file: with_header(
        '{"a":' + _entry(0, 8, shape=[2**62, 2**62]) + "}", bytes(8)
    ),
    "negative shape": lambda file: with_header('{"a":' + _entry(0, 8, shape=[-2]) + "}", bytes(8)),
    "unknown type": lambda file: with_header('{"a":' + _entry(0, 8, dtype="PY") + "}", bytes(8)),
    "a foreign tensor": lambda file: safetensors({**_tensors(file), "x": np.zeros(3, np.float32)}),
    "a tensor missing": lambda file: safetensors(dict(list(_tensors(file).items())[1:])),
    "another shape": _with_tensor(lambda tensor: tensor[:-1].copy()),
    "NaN": _with_tensor(lambda tensor: np.full_like(tensor, np.nan)),
    "infinite": _with_tensor(lambda tensor: np.full_like(tensor, np.inf)),
}
_WEIGHTS: list[tuple[Reader, str]] = [
    (_evaluate, "victim/final/model.safetensors"),
    (_init, "victim/final/model.safetensors"),
    (_resume, "victim/checkpoints/step_00000002/model-00000-of-00001.safetensors"),
    (_resume, "victim/checkpoints/step_00000002/optimizer-00000-of-00001.safetensors"),
    (_resume, "victim/checkpoints/step_00000002/rng-00000.safetensors"),
]
_OF_WEIGHTS = ("NaN", "infinite", "another shape", "a tensor missing", "a foreign tensor")
_CASES_L2 = [
    (bomb, read, name)
    for bomb in BOMBS
    for read, name in _WEIGHTS
    # What an optimizer keeps is its own affair, and one more random state is not looked at.
    if bomb not in _OF_WEIGHTS or "model" in name
]


@bar("L2", "safetensors that lie about their size, shape or names: refused within a second",
     total=len(_CASES_L2), ci=28, prepare=finished_run)  # fmt: skip
def bombs(trial: Trial) -> None:
    bomb, read, name = _CASES_L2[trial.index]
    own, file = victim(trial), trial.folder / name
    file.write_bytes(BOMBS[bomb](file))
    with walls(trial.folder / "canary"):
        said = read(trial, own, file)
    check_refusal(said, (5,))
    assert said.seconds < _FAST, f"refused after {said.seconds:.1f} s"


def _link(target: Path | str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        file.unlink(missing_ok=True)
        os.symlink(target, file)

    return make


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _outside(file: Path) -> None:
    """The file moved out of its folder, a link in its place."""
    place = file.parents[2] / "outside"
    place.mkdir()
    shutil.move(file, place / file.name)
    os.symlink(place / file.name, file)


TRICKS: dict[str, Callable[[Path], None]] = {
    "link out": _outside,
    "link to /dev/zero": _link("/dev/zero"),
    "link to itself": lambda file: _link(file.name)(file),
    "dangling link": _link("nowhere"),
    "pipe": _pipe,
    "folder": lambda file: (file.unlink(), file.mkdir())[1],
}
NAMES = (
    "../outside/model.safetensors", "/etc/passwd", "a/../../outside/model.safetensors",
    "..", ".", "", "a\0b.safetensors", "x" * 5000, "..\\outside\\model.safetensors",
    "model.safetensors\n", "\u202esrotsnetefas.ledom", "sub/model.safetensors", "~/x.safetensors",
    "file:///etc/passwd", "http://127.0.0.1:9/x.safetensors", "..\u2215outside\u2215x",
)  # fmt: skip
_FILES = [*_WEIGHTS, (_init, "victim/final/config.json"), (_evaluate, "victim/final/config.json"),
          (_resume, "victim/checkpoints/step_00000002/state.json"),
          (_resume, "victim/checkpoints/step_00000002/manifest.json"),
          (_read_data, "data/train/tokens-00000.npy"),
          (_read_data, "data/manifest.json")]  # fmt: skip
_CASES_L3 = [(trick, place) for trick in TRICKS for place in range(len(_FILES))]


@bar("L3", "links, pipes and devices in place of files: refused, none hangs",
     total=len(_CASES_L3), ci=18, prepare=finished_run)  # fmt: skip
def not_files(trial: Trial) -> None:
    trick, place = _CASES_L3[trial.index]
    read, name = _FILES[place]
    own, file = victim(trial), trial.folder / name
    if read is _resume and trick in ("pipe", "link to /dev/zero"):
        sign_checkpoint(own.checkpoint)
        read = _resume_signed
    TRICKS[trick](file)
    with walls(trial.folder / "canary"):
        said = read(trial, own, Path("manifest.json"))
    if read is not _read_data or trick != "link out":  # shards may lie on another disk
        check_refusal(said)
    assert said.seconds < _FAST


def _resume_signed(trial: Trial, own: Victim, file: Path) -> Said:
    return _train(trial, checkpoint__resume=str(own.checkpoint), training__max_steps=4)


@bar("L3b", "names that lead out of a folder, in an index and in both manifests: refused",
     total=3 * len(NAMES), ci=16, prepare=finished_run)  # fmt: skip
def names(trial: Trial) -> None:
    where, which = divmod(trial.index, len(NAMES))
    name, own = NAMES[which], victim(trial)
    outside = trial.folder / "outside"
    outside.mkdir()
    shutil.copy(own.model / "model.safetensors", outside)
    if where == 0:
        read: Reader = _evaluate
        keys = _tensors(own.model / "model.safetensors")
        (own.model / "model.safetensors").unlink()
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)})
        (own.model / "model.safetensors.index.json").write_text(index)
    elif where == 1:
        read = _resume
        _rename_in(own.checkpoint / "manifest.json", "model-00000-of-00001.safetensors", name)
        sign_checkpoint(own.checkpoint)
    else:
        read = _read_data
        _rename_in(own.data / "manifest.json", "train/tokens-00000.npy", name)
    with walls(trial.folder / "canary"):
        said = read(trial, own, Path("manifest.json"))
    check_refusal(said)


def _rename_in(manifest: Path, old: str, new: str) -> None:
    manifest.write_text(manifest.read_text().replace(json.dumps(old), json.dumps(new)))
