"""D2: a run whose data changes under it, or before it is started again."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reliability.area_d import check_line
from reliability.harness import Trial, bar
from reliability.runs import corpus, finish, fork, tiny
from training.conftest import make_documents, numbers

from llmnorm.data import PrepareOptions, prepare
from llmnorm.data.sources import Text
from llmnorm.training import loop


@dataclass(frozen=True)
class Straight:
    """What a run that nobody disturbs gives."""

    data: Path
    other: Path
    numbers: list[dict[str, Any]]


def straight(folder: Path) -> Straight:
    """A run to its end, and another prepared corpus with the same tokenizer."""
    config = tiny(folder / "straight")
    assert finish(fork(lambda: loop.train(config))) == 0
    (folder / "other.txt").write_text(make_documents(300, seed=11), encoding="utf-8")
    options = PrepareOptions(tokenizer=str(corpus()), val_fraction=0.05, shard_tokens=5000)

    def work() -> None:
        prepare(Text(folder / "other.txt", whole_files=False), folder / "other", options)

    assert finish(fork(work)) == 0
    return Straight(corpus(), folder / "other", numbers(config.output.dir))


def at_step(step: int, act: Callable[[], object]) -> None:
    """Do something in this process just before a step is taken."""
    real = loop.Trainer.take_step

    def take_step(self: Any, *arguments: Any) -> Any:
        if self.step == step:
            act()
        return real(self, *arguments)

    loop.Trainer.take_step = take_step  # type: ignore[method-assign]


def _every_shard(change: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def act(folder: Path, other: Path) -> None:
        for file in sorted(folder.glob("train/tokens-*.npy")):
            change(file)

    return act


def _rewritten(file: Path) -> None:
    np.save(file, np.load(file)[::-1])  # as many tokens, all in the vocabulary


def _replaced(file: Path) -> None:
    beside = file.with_name("beside.npy")
    np.save(beside, np.load(file)[::-1])
    beside.rename(file)


def _recreated(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(bytes(len(data)))


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _other_folder(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def _other_tokenizer(folder: Path, other: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"the"', '"eht"', 1) + " ")


CHANGES: dict[str, Callable[[Path, Path], None]] = {
    "cut in half": _every_shard(lambda file: os.truncate(file, file.stat().st_size // 2)),
    "emptied": _every_shard(lambda file: os.truncate(file, 0)),
    "rewritten": _every_shard(_rewritten),
    "longer": _every_shard(lambda file: file.open("ab").write(b"\1\0")),
    "replaced": _every_shard(_replaced),
    "removed": _every_shard(Path.unlink),
    "made again": _every_shard(_recreated),
    "now a folder": _every_shard(_as_folder),
    "whole folder removed": lambda folder, other: shutil.rmtree(folder),
    "other data": _other_folder,
    "other tokenizer": _other_tokenizer,
}
RESTART = -1  # in place of a number of workers
RUNS = [(*change, when) for change in CHANGES.items() for when in (0, 1, RESTART)]


@bar(
    "D2",
    "data changed while training or before a restart: a line, or the tokens it had",
    total=len(RUNS),
    ci=6,
    seconds=120,
    prepare=straight,
)
def changed_data_ends_in_a_line_or_changes_nothing(trial: Trial) -> None:
    name, act, workers = RUNS[trial.index]
    trial.note("restart" if workers == RESTART else f"{workers} workers")
    sys.stderr.write(f"{name}\n")
    shared: Straight = trial.shared
    folder = Path(shutil.copytree(shared.data, trial.folder / "data"))
    config = tiny(trial.folder / "run", data__path=str(folder), data__num_workers=max(workers, 0))

    def disturbed() -> int:
        at_step(7, lambda: os._exit(99) if workers == RESTART else act(folder, shared.other))
        return loop.train(config)

    code = finish(fork(disturbed))
    if workers == RESTART:
        assert code == 99
        act(folder, shared.other)
        code = finish(fork(lambda: loop.train(config)))
        assert code in (4, 5), f"exit code {code}"
    if code:
        assert code in (4, 5), f"exit code {code}"
        said = json.loads((config.output.dir / "exit.json").read_text())
        assert said["code"] == code
        check_line(said["cause"], trial.folder)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shared.data, folder)
        assert finish(fork(lambda: loop.train(config))) == 0
    assert numbers(config.output.dir) == shared.numbers
