"""B: a checkpoint is whole or it is not used, and the last good one is never given up."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reliability.harness import Trial, bar
from reliability.operations import before_each, count, killed_after, killed_at, wait_for_step
from reliability.runs import finish, fork, launch_ranks, outcome, run, tiny, words
from reliability.told import told
from training.saved import checkpoints_in, pieces_of, save

from llmnorm.durable import sha256_of
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.loop import train
from llmnorm.training.manifest import verify
from llmnorm.training.pieces import Piece
from llmnorm.training.ranks import Ranks
from llmnorm.training.saving import Saver

ALONE = Ranks(0, 1, torch.device("cpu"))
SAVED: dict[str, Any] = {"checkpoint__interval_steps": 3, "checkpoint__keep": 2}


@dataclass(frozen=True)
class Saved:
    """A run with two checkpoints, as if it had been killed before its end; one of two ranks too."""

    path: Path
    expected: Any
    ranks: Path


def saved(folder: Path) -> Saved:
    """Make both."""
    config = tiny(folder / "run", **SAVED)
    assert run(config) == 0
    expected = outcome(config)
    ranks = launch_ranks(words(folder / "ranks", **SAVED), 2, logs=folder / "logs")
    codes = ranks.wait(200)
    ranks.end()
    assert codes == [0, 0], ranks.outputs
    for path in (folder / "run", folder / "ranks"):
        shutil.rmtree(path / "final")
    return Saved(config.output.dir, expected, folder / "ranks")


def copied(trial: Trial, source: Path) -> tuple[Path, Path]:
    """Copy a run into the trial's folder; return its newest and its older checkpoint."""
    shutil.copytree(source, trial.folder / "run")
    older, newest = sorted((trial.folder / "run" / "checkpoints").iterdir())
    return newest, older


def falls_back(trial: Trial, file: str, whole_run: bool) -> None:
    """The damaged newest is named with its file, and the one before is used."""
    root = trial.folder / "run" / "checkpoints"
    older, newest = sorted(path for path in root.iterdir() if path.name.startswith("step"))[:2]
    if whole_run:
        config = tiny(trial.folder / "run", **SAVED)
        seen = told(config, trial.folder / "log")
        assert seen.code == 0, seen.lines
        assert len(seen.having(newest.name, "is damaged", file, "skipped")) == 1, seen.lines
        assert len(seen.having("continuing from", older.name)) == 1, seen.lines
        assert outcome(config) == trial.shared.expected
        trial.note("continued to the end")
    else:
        manifest = verify(older)
        facts = {key: manifest[key] for key in ("config", "data", "engine")}
        assert Checkpoints(root, ALONE, facts=facts).newest() == older
        trial.note("found")


@bar("B1", "one flipped bit in any file of a checkpoint", total=1000, ci=100, prepare=saved)
def flipped_bit(trial: Trial) -> None:
    newest, _ = copied(trial, trial.shared.path)
    path = trial.rng.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    path.write_bytes(content)
    falls_back(trial, path.name, whole_run=trial.rng.random() < 0.2)


def _cut(path: Path, older: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _empty(path: Path, older: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _longer(path: Path, older: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 9)))


def _missing(path: Path, older: Path, rng: random.Random) -> None:
    path.unlink()


def _extra(path: Path, older: Path, rng: random.Random) -> None:
    shutil.copy(path, path.with_name(f"more-{path.name}"))


def _swapped(path: Path, older: Path, rng: random.Random) -> None:
    if (older / path.name).read_bytes() == path.read_bytes():
        path = path.with_name("state.json")
    shutil.copy(older / path.name, path)


def _linked(path: Path, older: Path, rng: random.Random) -> None:
    path.rename(older.parent.parent / "elsewhere")
    path.symlink_to(older.parent.parent / "elsewhere")


def _folder(path: Path, older: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _whole(path: Path, older: Path, rng: random.Random) -> None:
    shutil.rmtree(path.parent)
    shutil.copytree(older, path.parent)


DAMAGE = (_cut, _cut, _empty, _longer, _missing, _extra, _swapped, _linked, _folder, _whole)


@bar("B2", "files cut, missing, foreign, swapped, of another rank", total=400, ci=60, prepare=saved)
def damaged_files(trial: Trial) -> None:
    if trial.index % 8 == 0:  # a file under the name of another rank's
        newest, _ = copied(trial, trial.shared.ranks)
        kind = trial.rng.choice(["model-0000{}-of-00002", "optimizer-0000{}-of-00002"])
        mine = trial.rng.randrange(2)
        names = [f"{kind.format(rank)}.safetensors" for rank in (mine, 1 - mine)]
        shutil.copy(newest / names[0], newest / names[1])
        falls_back(trial, names[1], whole_run=False)
        return
    newest, older = copied(trial, trial.shared.path)
    path = trial.rng.choice(sorted(newest.iterdir()))
    DAMAGE[trial.index % len(DAMAGE)](path, older, trial.rng)
    falls_back(trial, "", whole_run=trial.rng.random() < 0.2)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


@bar("B3", "all checkpoints damaged: one line, nothing lost", total=10, ci=5, prepare=saved)
def all_damaged(trial: Trial) -> None:
    newest, older = copied(trial, trial.shared.path)
    for folder in (newest, older):
        path = trial.rng.choice(sorted(folder.iterdir()))
        trial.rng.choice((_cut, _empty, _longer, _missing, _extra))(path, older, trial.rng)
    before = contents(trial.folder / "run")
    seen = told(tiny(trial.folder / "run", **SAVED), trial.folder / "log")
    assert seen.code == 5
    assert "verifies" in seen.cause()
    after = contents(trial.folder / "run")
    rewritten = {"config.yaml", "exit.json"}
    assert {name for name in before if after.get(name) != before[name]} <= rewritten


def prune(folder: Path) -> Callable[[], None]:
    """Three checkpoints, the middle one damaged; return a save that keeps two of four."""
    checkpoints = checkpoints_in(folder)
    _, damaged, _ = save(checkpoints, 1, 2, 3, keep=3)
    (damaged / "state.json").write_text("{}")
    saver = Saver(checkpoints, keep=2, overlap=True)
    return lambda: saver.save(4, pieces_of(4), {"step": 4}, last=True)


def pruned(folder: Path) -> int:
    """The number of file operations of that save."""
    return count(prune(folder / "checkpoints"), folder / "operations", before_each)


@bar("B5", "killed at each operation of a save that prunes", total=int, ci=200, prepare=pruned)
def killed_prune(trial: Trial) -> None:
    root = trial.folder / "checkpoints"
    assert killed_at(trial.index + 1, prune(root), before_each) < 0
    newest = checkpoints_in(root).newest()
    assert newest is not None
    assert newest.name in ("step_00000003", "step_00000004")
    save(checkpoints_in(root), 5)
    left = sorted(path.name for path in root.iterdir())
    assert len(left) == 2, left
    assert left[-1] == "step_00000005"
    for name in left:
        verify(root / name)


def _in_use(trial: Trial, run: Path) -> None:
    """A second run on the directory leaves in one line; the first does not notice."""
    config = tiny(run, **SAVED)
    first = fork(lambda: train(config))
    wait_for_step(config, 1)
    second = told(config, trial.folder / "log")
    assert second.code == 3
    assert "in use by another run" in second.cause()
    assert finish(first) == 0
    assert outcome(config) == trial.shared.expected


def _refused(trial: Trial, run: Path, before: Callable[[], object], *parts: str) -> None:
    seen = told(tiny(run, **SAVED), trial.folder / "log", before)
    assert seen.code == 3, seen.lines
    assert all(part in seen.cause() for part in (str(run), *parts)), seen.cause()


def _nobody() -> None:
    """Go on without root's rights."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def _read_only(trial: Trial, run: Path) -> None:
    run.mkdir(mode=0o555)
    _refused(trial, run, _nobody, "Permission denied")


def _of_another(trial: Trial, run: Path) -> None:
    copied(trial, trial.shared.path)
    run.chmod(0o700)
    _refused(trial, run, _nobody, "Permission denied")


def _a_file(trial: Trial, run: Path) -> None:
    run.write_text("mine")
    _refused(trial, run, lambda: None)
    assert run.read_text() == "mine"


def _dangling(trial: Trial, run: Path) -> None:
    run.symlink_to(trial.folder / "nowhere" / "else")
    _refused(trial, run, lambda: None)


def _continued(trial: Trial, run: Path) -> None:
    """A killed run is continued and equals one left alone."""
    config = tiny(run, **SAVED)
    killed_after(config, trial.rng.randrange(4, 12), 0)
    assert told(config, trial.folder / "log").code == 0
    assert outcome(config) == trial.shared.expected


def _link_to_run(trial: Trial, run: Path) -> None:
    (trial.folder / "disk").mkdir()
    run.symlink_to(trial.folder / "disk")
    _continued(trial, run)
    assert (trial.folder / "disk" / "final").is_dir()


def _link_above(trial: Trial, run: Path) -> None:
    (trial.folder / "disk").mkdir()
    (trial.folder / "runs").symlink_to(trial.folder / "disk")
    _continued(trial, trial.folder / "runs" / "run")


def _link_to_checkpoints(trial: Trial, run: Path) -> None:
    (trial.folder / "disk").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(trial.folder / "disk")
    (run / "config.yaml").write_text(tiny(run, **SAVED).to_yaml())
    _continued(trial, run)


def _clock_set_back(trial: Trial, run: Path) -> None:
    newest, older = copied(trial, trial.shared.path)
    for age, folder in ((10, older), (10**9, newest)):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age,) * 2)
    config, now, real = tiny(run, **SAVED), time.time(), time.time

    def back() -> None:
        time.time = lambda: real() - (3e7 if real() > now else 0)

    seen = told(config, trial.folder / "log", back)
    assert seen.code == 0
    assert len(seen.having("continuing from", newest.name)) == 1
    assert outcome(config) == trial.shared.expected


def _clock_jumps(trial: Trial, run: Path) -> None:
    real, rng = time.time, trial.rng

    def jump() -> None:
        time.time = lambda: real() + rng.uniform(-1e8, 1e8)

    config = tiny(run, **SAVED)
    assert told(config, trial.folder / "log", jump).code == 0
    assert outcome(config) == trial.shared.expected


PLACES = (
    *(_in_use, _read_only, _of_another, _a_file, _dangling),
    *(_link_to_run, _link_above, _link_to_checkpoints, _clock_set_back, _clock_jumps),
)


@bar("B6", "directories in use, read-only, linked; clocks", total=len(PLACES), ci=10, prepare=saved)
def strange_places(trial: Trial) -> None:
    place = PLACES[trial.index]
    trial.note(place.__name__.strip("_"))
    if place in (_read_only, _of_another) and os.getuid() != 0:
        trial.skip("only root can become somebody else")
    for path in (trial.folder, *trial.folder.parents):
        if path.is_relative_to(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o011)  # so that somebody else finds the run
    place(trial, trial.folder / "run")


@bar("B7", "what a save costs: 1 GB of pieces", total=2, ci=0, seconds=300)
def cost(trial: Trial) -> None:
    overlap = bool(trial.index)
    values = torch.rand(2**28)  # 1 GiB
    pieces = [
        Piece(name=f"w{index}", slot="", start=0, tensor=part, whole=True)
        for index, part in enumerate(values.chunk(16))
    ]
    checkpoints = checkpoints_in(trial.folder / "checkpoints")
    saver, stalled = Saver(checkpoints, keep=1, overlap=overlap), []
    for step in (1, 2):
        begun = time.monotonic()
        saver.save(step, pieces, {"step": step})
        stalled.append(time.monotonic() - begun)
        saver.wait()
        written = time.monotonic() - begun
    begun = time.monotonic()
    verify(trial.folder / "checkpoints" / "step_00000002")
    verified = time.monotonic() - begun
    mode = "overlapping" if overlap else "waiting"
    stall = f"stall {stalled[0]:.2f} s at first, then {stalled[1]:.2f} s"
    trial.note(f"{mode}: {stall}, saved {written:.2f} s, verified {verified:.2f} s")
