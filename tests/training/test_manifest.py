"""A checkpoint that is not what its manifest promises is refused, and a manifest that lies."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.errors import CheckpointError
from llmnorm.training.manifest import Damaged, manifest_text, read_state, verify

from .saved import checkpoints_in, save

pytestmark = pytest.mark.fast

SHARD = "model-00000-of-00001.safetensors"


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the right hash of itself."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_text(manifest_text(body))


def test_files_have_the_names_of_the_format(tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        SHARD,
        "optimizer-00000-of-00001.safetensors",
        "rng-00000.safetensors",
        "state.json",
    ]
    manifest = verify(folder)
    assert (manifest["step"], manifest["world"], manifest["engine"]) == (3, 1, "plain")


def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 1)
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
    (folder,) = save(checkpoints_in(tmp_path), 1)
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


def test_files_and_folders_of_another_checkpoint_are_found(tmp_path: Path) -> None:
    first, second = save(checkpoints_in(tmp_path), 1, 2)
    shutil.copytree(first, tmp_path / "step_00000007")
    with pytest.raises(Damaged, match="is of step 1"):
        verify(tmp_path / "step_00000007")
    shutil.copy(first / SHARD, second)
    with pytest.raises(Damaged, match="model-00000"):
        verify(second)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "x/../../secret", "rng-00001", ""])
def test_a_manifest_that_names_another_file_is_refused_before_anything_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = save(checkpoints_in(tmp_path / "c"), 1)
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setattr("llmnorm.training.manifest.sha256_of", lambda path: pytest.fail(str(path)))
    _rewrite(folder, lambda body: body["files"].update({name: body["files"].pop(SHARD)}))
    with pytest.raises(Damaged, match="no file of a checkpoint"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(world=2), "5 files for 2 ranks|4 files for 2 ranks"),
        (lambda body: body.update(world=10**18), "files for"),
        (lambda body: body.update(world="1"), "files for '1' ranks"),
        (lambda body: body.update(format=2), "format 2 is not 1"),
        (lambda body: body.update(step=[]), "not readable"),
        (lambda body: body.update(files=None), "not readable"),
        (lambda body: body["files"].update({SHARD: None}), "expected None"),
        (lambda body: body["files"][SHARD].update(size=-1), "expected -1"),
        (lambda body: body["files"][SHARD].update(sha256=None), "SHA-256"),
    ],
)
def test_a_manifest_with_a_right_hash_but_wrong_facts_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 1)
    _rewrite(folder, change)
    with pytest.raises(Damaged, match=message):
        verify(folder)


def test_links_pipes_and_bombs_are_refused(tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 1)
    manifest, shard = folder / "manifest.json", folder / SHARD
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    with pytest.raises(Damaged, match="missing"):
        verify(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(Damaged, match="missing"):
        verify(folder)
    for bomb in (b"[" * 200_000, b" " * 2**25, b"9" * 5000, b"\xff", b"null"):
        manifest.write_bytes(bomb)
        with pytest.raises(Damaged, match="not readable"):
            verify(folder)
    manifest.rename(tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    with pytest.raises(Damaged, match="symbolic link"):
        verify(folder)


@pytest.mark.parametrize("text", ["[", "[" * 200_000, '{"step": 2}', "{}", "null", " " * 2**25])
def test_a_state_that_no_run_wrote_is_one_line(text: str, tmp_path: Path) -> None:
    (folder,) = save(checkpoints_in(tmp_path), 1)
    assert read_state(folder) == {"step": 1}
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="was not written by a run"):
        read_state(folder)
