"""Which part of a mixture each position of the stream comes from: computed, never drawn or stored.

`batches.py` asks it for rows, `mixture.py` for numbers of documents.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Interleaving:
    """Deal the positions of an endless stream to parts by weight.

    Of n positions the first part takes floor(n * w_1), spread evenly; the others deal what is left
    among themselves in the same way. In exact fractions, so for any k, however large: of the first
    k positions part j has k * w_j, up to less than one with two parts and up to less than
    ``parts - 1`` with more.

    Args:
        weights: of the parts, positive; only their ratios matter.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        assert weights
        assert min(weights) > 0
        # (numerator, denominator) of each part's share of what the parts before it leave
        self._shares = [
            (weight / sum(weights[part:])).as_integer_ratio() for part, weight in enumerate(weights)
        ]

    def place(self, index: int) -> tuple[int, int]:
        """The part that has a position of the stream, and the position's number within it."""
        for part, (numerator, denominator) in enumerate(self._shares):
            before = index * numerator // denominator
            if (index + 1) * numerator // denominator > before:
                return part, before
            index -= before
        raise AssertionError("the last part takes all that is left")

    def many(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`place` of many positions, (count,) int64 each."""
        placed = [self.place(index) for index in indices.tolist()]
        parts, positions = np.array(placed, dtype=np.int64).reshape(-1, 2).T
        return parts, positions

    def counts(self, length: int) -> list[int]:
        """How many of the first ``length`` positions each part has."""
        found = []
        for numerator, denominator in self._shares:
            found.append(length * numerator // denominator)
            length -= found[-1]
        return found
