"""A save that overlaps training writes what was, not what is; a save that fails leaves nothing."""

import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmnorm.errors import CheckpointError
from llmnorm.training import saving
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.manifest import verify
from llmnorm.training.pieces import Piece
from llmnorm.training.saving import MOST_FAILED_SAVES, Saver

from .saved import checkpoints_in, pieces_of, save

WORKER = Path(__file__).with_name("saving_worker.py")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return checkpoints_in(tmp_path / "checkpoints")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Event:
    """The disk stands still until this is set."""
    gate, real = Event(), saving.write_pieces

    def write(path: Path, pieces: Any) -> Any:
        assert gate.wait(10)
        return real(path, pieces)

    monkeypatch.setattr(saving, "write_pieces", write)
    return gate


def _refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, name, no_space)


def _hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.fast
def test_training_goes_on_while_a_copy_is_written(checkpoints: Checkpoints, disk: Event) -> None:
    saver, pieces = Saver(checkpoints, keep=2, overlap=True), pieces_of(5)
    saver.save(5, pieces, {"step": 5})
    assert saver.busy
    pieces[0].tensor.zero_()  # the next step
    assert checkpoints.folders() == []
    disk.set()
    saver.wait()
    assert not saver.busy
    (folder,) = checkpoints.folders()
    verify(folder)
    written = load_file(folder / "model-00000-of-00001.safetensors")["w"]
    assert torch.equal(written, torch.full((4, 3), 5.0))


@pytest.mark.fast
@pytest.mark.parametrize("last", [False, True])
def test_a_slow_write_holds_no_value_of_a_later_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    real = saving.write_pieces

    def slowly(path: Path, pieces: Iterable[Piece]) -> Any:
        sleep(0.02)  # weights change and the next save begins meanwhile
        return real(path, pieces)

    monkeypatch.setattr(saving, "write_pieces", slowly)
    saver, weights = Saver(checkpoints, keep=9, overlap=True), pieces_of(1)
    for step in (1, 2, 3):
        weights[0].tensor.fill_(step)
        saver.save(step, weights, {"step": step}, last=last and step == 3)
        weights[0].tensor.fill_(-1.0)  # the step after
    saver.wait()
    for step, folder in zip((3, 2, 1), checkpoints.folders(), strict=True):
        verify(folder)
        written = load_file(folder / "model-00000-of-00001.safetensors")["w"]
        assert torch.equal(written, torch.full((4, 3), float(step)))


@pytest.mark.fast
def test_a_copy_takes_the_memory_of_the_one_before_and_leaves_none_at_the_end(
    checkpoints: Checkpoints, disk: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.set()
    saver, copied = Saver(checkpoints, keep=2, overlap=True), []
    real = saving.write_pieces

    def write_pieces(path: Path, pieces: Iterable[Piece]) -> object:
        pieces = list(pieces)
        copied.extend(piece.tensor for piece in pieces if piece.key == "w")
        return real(path, pieces)

    monkeypatch.setattr(saving, "write_pieces", write_pieces)
    for step in (1, 2):
        saver.save(step, pieces_of(step), {"step": step})
        saver.wait()
    first, second = (weakref.ref(tensor) for tensor in copied)
    assert first() is second()
    copied.clear()
    saver.save(3, pieces_of(3), {"step": 3}, last=True)
    assert first() is None
    for step in (2, 3):
        written = load_file(checkpoints.root / f"step_{step:08d}/model-00000-of-00001.safetensors")
        assert torch.equal(written["w"], torch.full((4, 3), float(step)))


@pytest.mark.fast
def test_a_save_waits_for_the_one_before(checkpoints: Checkpoints, disk: Event) -> None:
    saver = Saver(checkpoints, keep=2, overlap=True)
    saver.save(1, pieces_of(1), {"step": 1})
    disk.set()
    saver.save(2, pieces_of(2), {"step": 2})
    assert [path.name for path in checkpoints.folders()][-1] == "step_00000001"
    saver.close()  # finishes the second
    assert [path.name for path in checkpoints.folders()] == ["step_00000002", "step_00000001"]


@pytest.mark.fast
def test_without_overlap_the_checkpoint_is_there_when_save_returns(
    checkpoints: Checkpoints, disk: Event
) -> None:
    disk.set()
    saver = Saver(checkpoints, keep=2, overlap=False)
    saver.save(1, pieces_of(1), {"step": 1})
    verify(checkpoints.root / "step_00000001")
    assert not saver.busy


@pytest.mark.fast
def test_keep_leaves_the_newest_ones(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 2, 3, 4, 5, keep=3)
    left = ["step_00000005", "step_00000004", "step_00000003"]
    assert [path.name for path in checkpoints.folders()] == left
    assert _hidden(checkpoints.root) == []


@pytest.mark.fast
def test_keep_never_counts_a_damaged_one(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    good, damaged = save(checkpoints, 1, 2)
    (damaged / "state.json").write_text("{}")
    with caplog.at_level("WARNING"):
        (newest,) = save(checkpoints, 3)
    assert f"{damaged} is damaged (state.json has 2 bytes" in caplog.text
    assert checkpoints.folders() == [newest, damaged, good]
    (newest / "manifest.json").unlink()
    assert checkpoints.newest() == good
    shutil.rmtree(newest)
    save(checkpoints, 4, 5)
    assert [path.name for path in checkpoints.folders()] == ["step_00000005", "step_00000004"]


@pytest.mark.fast
def test_a_link_among_old_checkpoints_is_removed_but_not_followed(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    (elsewhere,) = save(checkpoints_in(tmp_path / "elsewhere"), 1)
    checkpoints.root.mkdir()
    (checkpoints.root / "step_00000001").symlink_to(elsewhere)
    save(checkpoints, 2, 3)
    assert not (checkpoints.root / "step_00000001").exists()
    verify(elsewhere)


@pytest.mark.fast
def test_a_save_replaces_the_damaged_checkpoint_of_its_step(checkpoints: Checkpoints) -> None:
    _, second = save(checkpoints, 1, 2)
    (second / "manifest.json").unlink()
    save(checkpoints, 2)
    verify(second)


@pytest.mark.fast
def test_a_sound_checkpoint_of_the_same_step_is_left_alone(checkpoints: Checkpoints) -> None:
    (folder,) = save(checkpoints, 1)
    before = folder.stat().st_ino
    save(checkpoints, 1)
    assert folder.stat().st_ino == before


@pytest.mark.fast
def test_what_a_killed_save_left_is_never_read_and_cleared_by_the_next(
    checkpoints: Checkpoints,
) -> None:
    first, second = save(checkpoints, 1, 2)
    second.rename(checkpoints.root / ".step_00000002.writing")
    assert checkpoints.newest() == first
    save(checkpoints, 2)
    assert _hidden(checkpoints.root) == []
    first.rename(checkpoints.root / ".step_00000001.old")
    Saver(checkpoints, keep=2, overlap=True).close()  # of a start that had nothing to save
    assert _hidden(checkpoints.root) == []


@pytest.mark.fast
@pytest.mark.parametrize("where", ["write_pieces", "write_tensors", "write_hashed", "sync"])
def test_a_failed_save_warns_and_leaves_nothing_until_it_fails_too_often(
    where: str,
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (good,) = save(checkpoints, 1)
    saver = Saver(checkpoints, keep=2, overlap=True)
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        _refuse(patch, where)
        for step in range(2, MOST_FAILED_SAVES + 1):
            saver.save(step, pieces_of(step), {"step": step})
            saver.wait()
            assert list(checkpoints.root.iterdir()) == [good]
    assert [len(record.message) < 300 for record in caplog.records] == [True, True]
    assert "No space left on device" in caplog.text
    saver.save(9, pieces_of(9), {"step": 9})  # works, so the count begins again
    saver.wait()
    _refuse(monkeypatch, where)
    saver.save(10, pieces_of(10), {"step": 10})
    saver.save(11, pieces_of(11), {"step": 11})
    with pytest.raises(CheckpointError, match=r"3 in a row.*No space left"):
        saver.save(12, pieces_of(12), {"step": 12}, last=True)
    assert [path.name for path in checkpoints.folders()] == ["step_00000009", "step_00000001"]


@pytest.mark.fast
def test_the_last_save_must_not_fail(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, "write_pieces")
    with pytest.raises(CheckpointError, match=r"1 in a row.*No space left"):
        save(checkpoints, 1)


@pytest.mark.fast
def test_metrics_that_cannot_be_written_are_a_failed_save(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    def sync() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    saver = Saver(checkpoints, keep=2, overlap=True)
    saver.save(1, pieces_of(1), {"step": 1}, first=sync)
    assert "No space left on device: 'metrics.jsonl'" in caplog.text
    assert list(checkpoints.root.iterdir()) == []


@pytest.mark.fast
def test_room_is_looked_for_before_anything_is_written(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20 + 95)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(saving, "write_pieces", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match="1048671 bytes free, the checkpoint needs 1048672"):
        save(checkpoints, 1)


def test_when_one_rank_cannot_write_all_ranks_go_on_and_stop_together(
    tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    first, second = run_ranks(WORKER, tmp_path / "c")
    counts = ["step 1: 0", "step 2: 1", "step 3: 2", "step 4: 0", "step 5: 1", "step 6: 2"]
    assert [line for line in first.splitlines() if line in counts] == counts
    assert "CheckpointError: " in first
    assert "rank 1 writes 12 bytes" in first
    assert second.splitlines()[-1] == "SystemExit: 5"
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "step_00000001",
        "step_00000004",
    ]
    assert verify(tmp_path / "c" / "step_00000004")["world"] == 2
