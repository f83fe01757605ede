"""Files are looked at before a library is let at them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmnorm.safe_files import (
    check_inside,
    check_name,
    check_plain_file,
    check_safetensors,
    open_safetensors,
    read_json,
)

pytestmark = pytest.mark.fast


def test_a_good_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3), "y": torch.zeros(2)}, path, {"format": "pt"})
    with open_safetensors(path, most_tensors=2) as handle:
        assert handle.get_tensor("x").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="names about 2 tensors; expected <= 1"):
        check_safetensors(path, most_tensors=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ends within its header"),
        (b"\xff" * 8, "ends within its header"),
        ((2**24 + 1).to_bytes(8, "little") + bytes(2**24 + 1), "a header of 16777217 bytes"),
        (b"\2\0\0\0\0\0\0\0[]", "is no safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason), open_safetensors(path):
        pass


def test_json_is_capped_in_size_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
    with pytest.raises(ValueError, match="has 10 bytes; expected at most 9"):
        read_json(path, 9)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "a\\b", "..", ".", "", "a\0", "a\n", 3])
def test_a_name_that_could_lead_elsewhere_is_refused(name: object) -> None:
    assert check_name("model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="is not the name of a file in the same folder"):
        check_name(name)


def test_links_may_not_lead_out_but_in_the_hub_s_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b").write_text("")
    for folder in (tmp_path / "model", tmp_path / "snapshots" / "c"):
        folder.mkdir(parents=True)
        (folder / "a").symlink_to(tmp_path / "blobs" / "b")
        (folder / "loop").symlink_to("loop")
    check_inside(tmp_path / "snapshots" / "c" / "a", tmp_path / "snapshots" / "c")
    for name in ("a", "loop"):
        with pytest.raises(ValueError, match="leads out of"):
            check_inside(tmp_path / "model" / name, tmp_path / "model")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        check_plain_file(tmp_path / "pipe")
