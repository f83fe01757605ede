"""Shards are the library's safetensors files, byte for byte but for its metadata."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmnorm.training.shards import _DTYPES, write_tensors

pytestmark = pytest.mark.fast

TENSORS = {
    "b": torch.arange(12.0).reshape(3, 4),
    "a.é": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "half": torch.linspace(-2, 2, 5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "strided": torch.arange(12.0).reshape(3, 4).T[1:],
}


def test_a_shard_has_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    facts = write_tensors(tmp_path / "ours", TENSORS)
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "theirs")
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert facts == {"size": len(ours), "sha256": hashlib.sha256(ours).hexdigest()}


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_every_dtype_reads_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(7).to(dtype)
    write_tensors(tmp_path / "x", {"x": tensor, "scalar": tensor[3].clone()})
    read = load_file(tmp_path / "x")
    assert read["x"].dtype == dtype
    assert torch.equal(read["x"].float(), tensor.float())
    assert read["scalar"].shape == ()


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="x"):
        write_tensors(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").read_text() == "mine"
