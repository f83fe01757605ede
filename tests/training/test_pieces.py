"""Pieces written by any number of ranks join to the same tensors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.errors import CheckpointError
from llmnorm.training.pieces import Owned, Piece, PieceReader, share, write_pieces

pytestmark = pytest.mark.fast


def _tensors() -> list[Owned]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (7, 5), "b.weight": (3,), "c.alpha": (1,), "d.weight": (2, 3, 4)}
    owned = []
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        owned.append(Owned(name=name, slot="exp_avg", tensor=tensor, split=True))
        owned.append(Owned(name=name, slot="step", tensor=torch.tensor(5.0), split=False))
    return owned


@given(world=st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_shares_of_all_ranks_are_disjoint_and_cover_everything(world: int) -> None:
    tensors = _tensors()
    seen = {f"{t.name}.{t.slot}": torch.zeros(t.tensor.numel()) for t in tensors}
    for rank in range(world):
        for piece in share(tensors, rank, world):
            stop = piece.start + piece.tensor.numel()
            seen[f"{piece.name}.{piece.slot}"][piece.start : stop] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_what_ranks_wrote_is_read_back_equal(world: int, tmp_path: Path) -> None:
    tensors = _tensors()
    for rank in range(world):
        path = tmp_path / f"optimizer-{rank:05d}-of-{world:05d}.safetensors"
        write_pieces(path, share(tensors, rank, world))
    reader = PieceReader(tmp_path, "optimizer")
    assert sorted(reader.names()) == sorted(f"{t.name}.{t.slot}" for t in tensors)
    for owned in tensors:
        read = reader.tensor(f"{owned.name}.{owned.slot}", owned.tensor.shape)
        assert read.dtype == owned.tensor.dtype
        assert torch.equal(read, owned.tensor)


def test_a_piece_that_is_not_whole_carries_its_start_in_its_key() -> None:
    piece = Piece(name="a.weight", slot="exp_avg", start=12, tensor=torch.ones(3), whole=False)
    assert piece.key == "a.weight.exp_avg@12"
    whole = Piece(name="a.weight", slot="", start=0, tensor=torch.ones(3), whole=True)
    assert whole.key == "a.weight"


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    tensors = _tensors()
    for rank in (0, 2):
        path = tmp_path / f"optimizer-{rank:05d}-of-00003.safetensors"
        write_pieces(path, share(tensors, rank, 3))
    reader = PieceReader(tmp_path, "optimizer")
    with pytest.raises(CheckpointError, match=r"a\.weight\.exp_avg"):
        reader.tensor("a.weight.exp_avg", torch.Size([7, 5]))


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"a": (2, 3)}, "other parameters: b"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "other parameters: c"),
        ({"a": (2, 3), "b": (5,)}, "b has 5 elements, expected 4"),
        ({"a": (3, 3), "b": (4,)}, "a has 9 elements, expected 6"),
    ],
)
def test_weights_of_another_model_are_refused(
    stored: dict[str, tuple[int, ...]], said: str, tmp_path: Path
) -> None:
    pieces = [
        Piece(name=name, slot="", start=0, tensor=torch.zeros(shape), whole=True)
        for name, shape in stored.items()
    ]
    write_pieces(tmp_path / "model-00000-of-00001.safetensors", pieces)
    with pytest.raises(CheckpointError, match=said):
        PieceReader(tmp_path, "model").check({"a": torch.Size([2, 3]), "b": torch.Size([4])})


@pytest.mark.parametrize(
    ("slot", "whole", "size", "said"),
    [
        ("a.exp_avg", False, 5, "a.exp_avg has 5 elements, expected 6"),
        ("z.exp_avg", True, 6, "z.exp_avg is of no parameter"),
    ],
)
def test_an_optimizers_state_of_another_model_is_refused(
    slot: str, whole: bool, size: int, said: str, tmp_path: Path
) -> None:
    name, _, kept = slot.partition(".")
    piece = Piece(name=name, slot=kept, start=0, tensor=torch.zeros(size), whole=whole)
    write_pieces(tmp_path / "optimizer-00000-of-00001.safetensors", [piece])
    with pytest.raises(CheckpointError, match=said):
        PieceReader(tmp_path, "optimizer").check({"a": torch.Size([2, 3])})
