"""Pieces: the unit of a checkpoint, the same for every engine.

A piece is a contiguous flat range of one row-major tensor: a parameter (slot "") or what an
optimizer keeps for it (slot "exp_avg", ...). A rank writes the pieces it owns without talking to
the others; a reader joins whatever range it needs from whoever wrote it. Files are safetensors
whose keys are `NAME` or `NAME.SLOT`, with `@START` when the piece is not the whole tensor.
Read `checkpoint.py` next.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmnorm.durable import FileFacts
from llmnorm.errors import CheckpointError
from llmnorm.safe_files import check_safetensors
from llmnorm.training.shards import write_tensors

GROUPS = "param_groups"
"""Pseudo-parameter under which the numbers of the optimizer's groups are saved."""

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


def write_pieces(path: Path, pieces: Iterable[Piece]) -> FileFacts:
    """Write pieces into one new safetensors file; return its size and hash."""
    return write_tensors(path, {piece.key: piece.tensor for piece in pieces})


class PieceReader:
    """Reads ranges of tensors from the pieces of a checkpoint, whoever wrote them.

    Args:
        folder: a checkpoint whose manifest has been verified.
        prefix: `model` or `optimizer`: which shards to read.

    Raises:
        CheckpointError: if a shard is no safetensors file.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self._where: dict[str, list[_Stored]] = {}
        for path in sorted(folder.glob(f"{prefix}-*-of-*.safetensors")):
            try:
                check_safetensors(path)
                handle = safe_open(path, "pt")
                for key in list(handle.keys()):
                    match = _PARTIAL.match(key)
                    name, start = (match[1], int(match[2])) if match else (key, 0)
                    stored = _Stored(start, path, key, handle)
                    self._where.setdefault(name, []).append(stored)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path} is no safetensors file: {error}") from error
        for pieces in self._where.values():
            pieces.sort(key=lambda stored: stored.start)

    def names(self) -> list[str]:
        """Return the names of all tensors, `NAME` or `NAME.SLOT`."""
        return list(self._where)

    def _pieces(self, key: str) -> list["_Stored"]:
        if key not in self._where:
            raise CheckpointError(f"{self.folder}: {key} is missing")
        return self._where[key]

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Compare what is stored with the parameters of a model, by name and size.

        Raises:
            CheckpointError: naming the first that is missing, foreign or of another size.
        """
        if self.prefix == "model" and set(self.names()) != set(shapes):
            differing = sorted(set(self.names()) ^ set(shapes))
            raise CheckpointError(
                f"{self.folder} holds other parameters: {', '.join(differing[:3])}"
            )
        for key, pieces in self._where.items():
            name = key if self.prefix == "model" else key.rpartition(".")[0]
            shape, stored = shapes.get(name), sum(piece.numel for piece in pieces)
            differs = shape is not None and stored != shape.numel()
            if differs and (self.prefix == "model" or self.whole_shape(key) is None):
                assert shape is not None
                raise CheckpointError(
                    f"{self.folder}: {key} has {stored} elements, expected {shape.numel()}"
                )
            if shape is None and not name.startswith(f"{GROUPS}."):
                raise CheckpointError(f"{self.folder}: {key} is of no parameter of this model")

    def whole_shape(self, key: str) -> torch.Size | None:
        """Return the shape of a tensor that was written whole, None for one in parts."""
        first = self._pieces(key)[0]
        return first.shape if first.key == key else None

    def tensor(self, key: str, shape: torch.Size) -> Tensor:
        """Return a whole tensor; `shape` says its form when it was written in parts.

        Raises:
            CheckpointError: if pieces are missing, overlap or are of another size.
        """
        whole = self.whole_shape(key)
        shape = shape if whole is None else whole
        stored = sum(piece.numel for piece in self._pieces(key))
        if stored != shape.numel():
            raise CheckpointError(
                f"{self.folder}: {key} has {stored} elements, expected {shape.numel()}"
            )
        return self.flat(key, 0, shape.numel()).reshape(shape)

    def flat(self, key: str, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of a flattened tensor, a new 1-D tensor.

        Only the files that hold them are read, and of these only the rows that are needed.

        Raises:
            CheckpointError: if pieces are missing or overlap, or weights are no numbers.
        """
        parts, expected = [], start
        for piece in self._pieces(key):
            if piece.start >= stop or piece.start + piece.numel <= start:
                continue
            low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
            if low != expected:
                raise CheckpointError(
                    f"{piece.path}: {key} continues at {low}, expected {expected}"
                )
            parts.append(piece.read(low, high))
            expected = high
        if expected != stop:
            raise CheckpointError(f"{self.folder}: {key} ends at {expected}, expected {stop}")
        values = torch.cat(parts) if parts else torch.empty(0)
        if self.prefix == "model" and not values.isfinite().all():
            raise CheckpointError(f"{self.folder}: {key} is not finite, which no run saves")
        return values


class _Stored:
    """A piece in its file, read when asked for."""

    def __init__(self, start: int, path: Path, key: str, handle: Any) -> None:
        self.start, self.path, self.key, self._handle = start, path, key, handle
        self.shape = torch.Size(handle.get_slice(key).get_shape())
        self.numel = self.shape.numel()

    def read(self, low: int, high: int) -> Tensor:
        """Return the elements [low, high), counted in the whole tensor."""
        low, high = low - self.start, high - self.start
        if not self.shape:
            return self._handle.get_tensor(self.key).reshape(1)
        row = self.numel // self.shape[0]
        first, last = low // row, -(-high // row)
        rows = self._handle.get_slice(self.key)[first:last].flatten()
        return rows[low - first * row : high - first * row].clone()
