"""Where a token's position enters: queries and keys (RoPE), the embedding (learned), or nowhere.

`rotary.py` is the rotation; this file has the learned table and the choice between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .rotary import Table, rotate


class LearnedPositions(nn.Embedding):
    """Add a learned vector to each token's embedding: x = token + table[position].

    The sum is what the embedding's treatment then scales or normalizes: GPT-2 and OPT do nothing
    more, Derf's GPT-2 scales the sum. The table starts with the standard deviation of the token
    embedding (GPT-2's original code: half of it, 0.01) and is treated as that in training.

    Shape: tokens and the result are (batch, seq, hidden), position_ids is (batch, seq) or (1, seq),
    weight is (max_position_embeddings, hidden).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and
    transformers' GPT-2.
    """

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, position_ids: torch.Tensor, *, cached: bool
    ) -> torch.Tensor:
        self._check(position_ids, cached=cached)
        return tokens + super().forward(position_ids)

    def _check(self, position_ids: torch.Tensor, *, cached: bool) -> None:
        """Raise ValueError for a position beyond the table, before a device does so by an assert.

        Reading positions waits for the device, so it is done only where shapes leave a doubt: in a
        row longer than the table, which restarting positions allow, or after a cache. Compiled code
        leaves it to torch's own check.
        """
        short = position_ids.shape[-1] <= self.num_embeddings and not cached
        if short or torch.compiler.is_compiling():
            return
        last = int(position_ids.max())
        if last >= self.num_embeddings:
            raise ValueError(
                f"the sequence has {last + 1} positions, but the learned table has "
                f"max_position_embeddings={self.num_embeddings}; use a shorter sequence"
            )


class NoTable(nn.Module):
    """Leave the embedding as it is: it knows nothing of positions."""

    def forward(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, *, cached: bool
    ) -> torch.Tensor:
        return tokens


def keep(query: torch.Tensor, key: torch.Tensor, table: Table) -> Table:
    """Leave queries and keys as they are."""
    return query, key


@dataclass(frozen=True, kw_only=True)
class Position:
    """A choice of the config field `position`.

    `attend` acts on queries and keys; `learned` says whether a table is added to the embedding.
    """

    attend: Callable[[torch.Tensor, torch.Tensor, Table], Table] = keep
    learned: bool = False


POSITIONS = {
    "rope": Position(attend=rotate),
    "learned": Position(learned=True),
    "none": Position(),
}


def build_positions(config: Any) -> nn.Module:
    """What adds positions to the embedding, as an `LlmNormConfig` asks."""
    if not POSITIONS[config.position].learned:
        return NoTable()
    return LearnedPositions(config.max_position_embeddings, config.hidden_size)
