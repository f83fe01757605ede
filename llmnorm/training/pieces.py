"""Pieces: the unit of a checkpoint, the same for every engine.

A piece is a contiguous flat range of one row-major tensor: a parameter (slot "") or what an
optimizer keeps for it (slot "exp_avg", ...). A rank writes the pieces it owns without talking to
the others; a reader joins whatever range it needs from whoever wrote it. Files are safetensors
whose keys are `NAME` or `NAME.SLOT`, with `@START` when the piece is not the whole tensor.
Read `checkpoint.py` next.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmnorm.errors import CheckpointError

_PARTIAL = re.compile(r"^(.*)@(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of a tensor.

    Args:
        name: the parameter's name in the state dict.
        slot: "" for the parameter itself, else the optimizer's name for the state.
        start: index of the first element in the flattened tensor.
        tensor: the whole tensor in its shape (`whole`), else a 1-D part of it.
        whole: whether nothing of the tensor is missing.
    """

    name: str
    slot: str
    start: int
    tensor: Tensor
    whole: bool

    @property
    def key(self) -> str:
        """Name of the piece in its file."""
        key = f"{self.name}.{self.slot}" if self.slot else self.name
        return key if self.whole else f"{key}@{self.start}"


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A tensor of which every rank has a copy; `split`: several ranks may write parts of it."""

    name: str
    slot: str
    tensor: Tensor
    split: bool


def share(tensors: Iterable[Owned], rank: int, world: int) -> Iterator[Piece]:
    """Yield this rank's part of replicated tensors: an equal range of their concatenation.

    The ranges of all ranks are disjoint and cover everything; a tensor that may not be split
    belongs to the rank in whose range it starts.
    """
    tensors = [owned for owned in tensors if owned.tensor.numel()]
    total = sum(owned.tensor.numel() for owned in tensors)
    low, high = total * rank // world, total * (rank + 1) // world
    offset = 0
    for owned in tensors:
        size = owned.tensor.numel()
        start, stop = max(low, offset) - offset, min(high, offset + size) - offset
        whole = (start, stop) == (0, size) or not owned.split
        mine = start < stop if owned.split else low <= offset < high
        offset += size
        if not mine:
            continue
        tensor = owned.tensor.detach()
        if whole:
            yield Piece(name=owned.name, slot=owned.slot, start=0, tensor=tensor, whole=True)
        else:
            part = tensor.reshape(-1)[start:stop]
            yield Piece(name=owned.name, slot=owned.slot, start=start, tensor=part, whole=False)


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Write pieces into one safetensors file."""
    save_file({piece.key: piece.tensor.cpu().contiguous() for piece in pieces}, path)


class PieceReader:
    """Reads whole tensors from the pieces of a checkpoint, whoever wrote them.

    Args:
        folder: a checkpoint whose manifest has been verified.
        prefix: `model` or `optimizer`: which shards to read.

    Raises:
        CheckpointError: if a shard is no safetensors file.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self._where: dict[str, list[tuple[int, Path, str]]] = {}
        for path in sorted(folder.glob(f"{prefix}-*-of-*.safetensors")):
            try:
                with safe_open(path, "pt") as handle:
                    keys = list(handle.keys())
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no safetensors file: {error}") from error
            for key in keys:
                match = _PARTIAL.match(key)
                name, start = (match[1], int(match[2])) if match else (key, 0)
                self._where.setdefault(name, []).append((start, path, key))

    def names(self) -> list[str]:
        """Return the names of all tensors, `NAME` or `NAME.SLOT`."""
        return list(self._where)

    def tensor(self, key: str, shape: torch.Size) -> Tensor:
        """Return a tensor joined from its pieces.

        Args:
            key: `NAME` or `NAME.SLOT`.
            shape: the tensor's shape, used when it was written in parts.

        Raises:
            CheckpointError: if pieces are missing, overlap or are of another size.
        """
        pieces = sorted(self._where.get(key, []))
        parts = []
        for _, path, stored in pieces:
            with safe_open(path, "pt") as handle:
                parts.append(handle.get_tensor(stored))
        if len(pieces) == 1 and pieces[0][2] == key:
            return parts[0].clone()
        expected = 0
        for (start, path, _), part in zip(pieces, parts, strict=True):
            if start != expected:
                raise CheckpointError(f"{path}: {key} continues at {start}, expected {expected}")
            expected += part.numel()
        if expected != shape.numel():
            raise CheckpointError(
                f"{self.folder}: {key} has {expected} elements, expected {shape.numel()}"
            )
        return torch.cat(parts).reshape(shape)
