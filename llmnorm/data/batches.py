"""Batches for training: the same global batch at the same step, whatever the world's size.

Stream index s * global_batch_size + p is position p of step s; `interleaving.py` says which split
it comes from where there are several, `order.py` which sample of it that is. Rank, micro-batch and
worker only decide who reads which position.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError
from .interleaving import Interleaving
from .order import SampleOrder
from .prepared import Split

IGNORED = -100  # the target that losses of torch and transformers leave out


class GlobalBatches:
    """This rank's micro-batches of every global step.

    A sample is ``seq_len + 1`` consecutive tokens, samples are ``seq_len`` apart, inputs are all
    but the last token and targets all but the first. Position p of a step goes to row j of
    micro-batch m of rank r with p = (m * world + r) * micro_batch_size + j. Rows beyond the global
    batch are padding: their targets are -100. So every rank has the same number of micro-batches
    of the same shape in every step, even one that has no row of the step: sharded engines
    communicate in each forward.

    Args:
        splits: what to read.
        seq_len: tokens in a row.
        global_batch_size: rows of all ranks in a step.
        micro_batch_size: rows of one forward pass.
        seed: of the order of samples.
        eos_token_id: where a document begins.
        weights: each split's share of the rows, as ratios.
        rank: this process, of ``world``.
        world: number of processes.
        document_mask: add ``position_ids`` that restart at every document. A transformers model
            then keeps attention inside documents, but only without a cache and without an
            attention mask: call it with ``use_cache=False``.
        num_workers: processes that prefetch in `iterate`; 0 reads in this one.

    Raises:
        ConfigError: a size below one, or a rank outside the world.
        DataError: the split is shorter than one sample.
    """

    def __init__(
        self,
        *splits: Split,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        eos_token_id: int,
        weights: Sequence[Fraction] = (Fraction(1),),
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
        num_workers: int = 0,
    ) -> None:
        sizes = {
            "seq_len": seq_len,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "world": world,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not in a world of {world}")
        assert len(splits) == len(weights)
        self.splits, self.interleaving = splits, Interleaving(weights)
        self.orders = [
            SampleOrder(samples_in(split, seq_len), seed, part) for part, split in enumerate(splits)
        ]
        self.seq_len, self.eos_token_id = seq_len, eos_token_id
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self.document_mask, self.num_workers = document_mask, num_workers
        self.accumulation: int = -(-global_batch_size // (micro_batch_size * world))

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of one global step (0-based).

        Returns:
            ``accumulation`` dicts of (micro_batch_size, seq_len) int64 tensors: ``input_ids``,
            ``targets`` and, with ``document_mask``, ``position_ids``.
        """
        return [self._micro_batch(step, micro) for micro in range(self.accumulation)]

    def iterate(self, start_step: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Steps from ``start_step`` on without end, epoch after epoch, prefetched by workers."""
        if not self.num_workers:
            yield from map(self.step, itertools.count(start_step))
            return
        # The loader draws a seed for its workers: from a generator of its own, so that the
        # program's random state does not depend on num_workers.
        loader: DataLoader[list[dict[str, torch.Tensor]] | DataError] = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=itertools.count(start_step),
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
        for item in loader:
            if isinstance(item, DataError):
                raise item
            yield item

    def _micro_batch(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        first = (micro * self.world + self.rank) * self.micro_batch_size
        count = min(max(self.global_batch_size - first, 0), self.micro_batch_size)
        shape = (self.micro_batch_size, self.seq_len)
        inputs = np.full(shape, self.eos_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        begin = step * self.global_batch_size + first
        for row, window in enumerate(self._windows(np.arange(begin, begin + count))):
            inputs[row], targets[row] = window[:-1], window[1:]
        batch = {"input_ids": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        if self.document_mask:
            batch["position_ids"] = torch.from_numpy(document_positions(inputs, self.eos_token_id))
        return batch

    def _windows(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """The (seq_len + 1,) tokens of every stream index."""
        parts, positions = self.interleaving.many(indices)
        samples = np.empty_like(positions)
        for part, order in enumerate(self.orders):
            samples[parts == part] = order.many(positions[parts == part])
        for part, sample in zip(parts.tolist(), samples.tolist(), strict=True):
            yield self.splits[part].window(sample * self.seq_len, self.seq_len + 1)


def samples_in(split: Split, seq_len: int) -> int:
    """Samples in an epoch of a split.

    Raises:
        DataError: there is none.
    """
    samples = (split.tokens - 1) // seq_len
    if samples < 1:
        raise DataError(
            f"{split.path}: {split.tokens} tokens are fewer than one sample of seq_len + 1 = "
            f"{seq_len + 1}; lower data.seq_len or prepare more text"
        )
    return samples


def document_positions(input_ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Positions that restart at every end-of-text and at the row's start.

    Shape: input_ids and the result are (batch, seq).
    """
    positions = np.arange(input_ids.shape[1])
    starts = np.where(input_ids == eos_token_id, positions, 0)
    return positions - np.maximum.accumulate(starts, axis=1)


class _Steps(Dataset[list[dict[str, torch.Tensor]] | DataError]):
    def __init__(self, batches: GlobalBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]] | DataError:
        try:
            return self.batches.step(step)
        except DataError as error:  # raised in a worker it would arrive wrapped in a traceback
            return error
