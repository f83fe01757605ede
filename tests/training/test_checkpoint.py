"""A checkpoint is whole or it is not used; a damaged one is named."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmnorm.errors import CheckpointError
from llmnorm.training.checkpoint import read_rng

from .saved import checkpoints_in, save

pytestmark = pytest.mark.fast


def test_the_newest_verified_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path / "c")
    assert checkpoints.newest() is None
    save(checkpoints, 9, 10)
    assert checkpoints.newest() == tmp_path / "c" / "step_00000010"


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    first, second = save(checkpoints, 1, 2)
    with open(second / "state.json", "a") as handle:
        handle.write(" ")
    with caplog.at_level("WARNING"):
        assert checkpoints.newest() == first
    assert "step_00000002" in caplog.text
    assert "state.json" in caplog.text


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    folders = save(checkpoints, 1, 2)
    for folder in folders:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies"):
        checkpoints.newest()
    assert all((folder / "state.json").exists() for folder in folders)


@pytest.mark.parametrize("fact", ["config", "data"])
def test_a_checkpoint_of_another_run_is_refused(fact: str, tmp_path: Path) -> None:
    save(checkpoints_in(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"another (run file|data)"):
        checkpoints_in(tmp_path, **{fact: "x" * 64}).newest()


def test_a_path_may_name_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    first, second = save(checkpoints_in(tmp_path / "old" / "checkpoints"), 1, 2)
    fresh = checkpoints_in(tmp_path / "new" / "checkpoints")
    assert fresh.choose(first) == first
    assert fresh.choose(tmp_path / "old") == second
    (second / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        fresh.choose(second)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        fresh.choose(tmp_path)


def test_a_run_further_along_than_the_path_it_began_from_goes_on(tmp_path: Path) -> None:
    old = checkpoints_in(tmp_path / "old" / "checkpoints")
    (begun_from,) = save(old, 2)
    run = checkpoints_in(tmp_path / "new" / "checkpoints")
    earlier, newest = save(run, 3, 5)
    assert run.choose(begun_from) == newest
    with pytest.raises(CheckpointError, match="go back before"):
        run.choose(earlier)


def test_a_path_may_be_a_link_but_a_checkpoint_of_the_run_may_not(tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path / "old"), 2)
    (tmp_path / "best").symlink_to(folder)
    assert checkpoints_in(tmp_path / "new").choose(tmp_path / "best") == folder
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / folder.name).symlink_to(folder)
    with pytest.raises(CheckpointError, match="symbolic link"):
        checkpoints_in(tmp_path / "linked").newest()


def test_random_states_of_no_run_are_one_line(tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 1)
    path = folder / "rng-00000.safetensors"
    for states in ({}, {"python.words": torch.zeros(3)}, {"python.words": torch.zeros(0)}):
        save_file(states, path)
        with pytest.raises(CheckpointError, match="no random states"):
            read_rng(folder, rank=0)
    path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="no random states"):
        read_rng(folder, rank=0)


def test_random_states_survive_survive_a_round_trip(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)
    (folder,) = save(checkpoints_in(tmp_path), 1)
    draws = []
    for _ in range(2):
        draws.append((random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3)))
        read_rng(folder, rank=0)
    assert draws[0][:3] == draws[1][:3]
    assert torch.equal(draws[0][3], draws[1][3])
