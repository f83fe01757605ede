"""A checkpoint is whole or it is not used; a damaged one is named."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmnorm.errors import CheckpointError
from llmnorm.training.checkpoint import Checkpoints, Damaged, read_rng, verify
from llmnorm.training.pieces import Piece
from llmnorm.training.ranks import Ranks

pytestmark = pytest.mark.fast

ALONE = Ranks(0, 1, torch.device("cpu"))
FACTS = {"config": "c" * 64, "data": "d" * 64, "engine": "plain"}


def _checkpoints(root: Path, keep: int = 2, **facts: str) -> Checkpoints:
    return Checkpoints(root, ALONE, keep=keep, facts={**FACTS, **facts})


def _pieces(step: int) -> list[Piece]:
    values = torch.full((4, 3), float(step))
    return [
        Piece(name="w", slot="", start=0, tensor=values, whole=True),
        Piece(name="w", slot="exp_avg", start=0, tensor=-values, whole=True),
    ]


def _save(checkpoints: Checkpoints, *steps: int) -> list[Path]:
    for step in steps:
        checkpoints.save(step, _pieces(step), {"step": step})
    return [checkpoints.root / f"step_{step:08d}" for step in steps]


def test_the_newest_verified_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    _save(checkpoints, 9, 10)
    assert checkpoints.newest() == tmp_path / "c" / "step_00000010"


def test_files_have_the_names_of_the_format(tmp_path: Path) -> None:
    (folder,) = _save(_checkpoints(tmp_path), 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model-00000-of-00001.safetensors",
        "optimizer-00000-of-00001.safetensors",
        "rng-00000.safetensors",
        "state.json",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["engine"]) == (3, 1, "plain")


def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    (folder,) = _save(_checkpoints(tmp_path), 1)
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for _ in range(40):
            flipped = bytearray(original)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(Damaged, match=path.name if path.suffix != ".json" else "json"):
                verify(folder)
        path.write_bytes(original)
    verify(folder)


def test_truncated_missing_and_extra_files_are_found(tmp_path: Path) -> None:
    (folder,) = _save(_checkpoints(tmp_path), 1)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for size in (0, 1, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:size])
            with pytest.raises(Damaged):
                verify(folder)
        path.unlink()
        with pytest.raises(Damaged, match="missing"):
            verify(folder)
        path.write_bytes(original)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(Damaged, match="not in the manifest"):
        verify(folder)


def test_files_swapped_between_two_checkpoints_are_found(tmp_path: Path) -> None:
    first, second = _save(_checkpoints(tmp_path), 1, 2)
    shutil.copy(first / "model-00000-of-00001.safetensors", second)
    with pytest.raises(Damaged, match="model-00000"):
        verify(second)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = _checkpoints(tmp_path)
    first, second = _save(checkpoints, 1, 2)
    with open(second / "state.json", "a") as handle:
        handle.write(" ")
    with caplog.at_level("WARNING"):
        assert checkpoints.newest() == first
    assert "step_00000002" in caplog.text
    assert "state.json" in caplog.text


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    folders = _save(checkpoints, 1, 2)
    for folder in folders:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies"):
        checkpoints.newest()
    assert all((folder / "state.json").exists() for folder in folders)


def test_keep_leaves_the_newest_ones(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, keep=3)
    _save(checkpoints, 1, 2, 3, 4, 5)
    assert [path.name for path in checkpoints.folders()] == [
        "step_00000005",
        "step_00000004",
        "step_00000003",
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_keep_never_removes_the_last_verified_one(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, keep=1)
    good, *_ = _save(checkpoints, 1)
    damaged = tmp_path / "step_00000005"
    shutil.copytree(good, damaged)
    (damaged / "manifest.json").unlink()
    _save(checkpoints, 2)
    assert checkpoints.newest() == tmp_path / "step_00000002"


def test_a_save_replaces_the_damaged_checkpoint_of_its_step(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    _, second = _save(checkpoints, 1, 2)
    (second / "manifest.json").unlink()
    _save(checkpoints, 2)
    verify(second)


def test_what_a_killed_save_left_is_never_read_and_cleared_by_the_next(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    first, second = _save(checkpoints, 1, 2)
    second.rename(tmp_path / ".step_00000002.writing")
    assert checkpoints.newest() == first
    _save(checkpoints, 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_save_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = _checkpoints(tmp_path)
    _save(checkpoints, 1)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmnorm.training.checkpoint.write_pieces", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        _save(checkpoints, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("fact", ["config", "data"])
def test_a_checkpoint_of_another_run_is_refused(fact: str, tmp_path: Path) -> None:
    _save(_checkpoints(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"another (run file|data)"):
        _checkpoints(tmp_path, **{fact: "x" * 64}).newest()


def test_a_path_may_name_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    first, second = _save(_checkpoints(tmp_path / "old" / "checkpoints"), 1, 2)
    fresh = _checkpoints(tmp_path / "new" / "checkpoints")
    assert fresh.choose(first) == first
    assert fresh.choose(tmp_path / "old") == second
    (second / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        fresh.choose(second)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        fresh.choose(tmp_path)


def test_a_run_further_along_than_the_path_it_began_from_goes_on(tmp_path: Path) -> None:
    old = _checkpoints(tmp_path / "old" / "checkpoints")
    (begun_from,) = _save(old, 2)
    run = _checkpoints(tmp_path / "new" / "checkpoints")
    earlier, newest = _save(run, 3, 5)
    assert run.choose(begun_from) == newest
    with pytest.raises(CheckpointError, match="go back before"):
        run.choose(earlier)


def test_random_states_survive_a_round_trip(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)
    (folder,) = _save(_checkpoints(tmp_path), 1)
    draws = []
    for _ in range(2):
        draws.append((random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3)))
        read_rng(folder, rank=0)
    assert draws[0][:3] == draws[1][:3]
    assert torch.equal(draws[0][3], draws[1][3])
