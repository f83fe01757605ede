"""Many documents as flat arrays: what passes from the tokenizer to the shards."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Token ids of many documents, one after another, without end-of-text.

    Shape: values is (tokens,), any integer type; lengths and utf8_bytes are (documents,) int64.
    """

    values: np.ndarray
    lengths: np.ndarray
    utf8_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, chosen: np.ndarray) -> "Ragged":
        """The documents where the (documents,) boolean array is true."""
        if chosen.all():
            return self
        return Ragged(
            self.values[np.repeat(chosen, self.lengths)],
            self.lengths[chosen],
            self.utf8_bytes[chosen],
        )

    def stored(self, eos_token_id: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The token stream, every document led by end-of-text, and the end of each document.

        Returns:
            stream (tokens + documents,) of ``dtype`` and ends (documents,) int64.
        """
        ends = np.cumsum(self.lengths + 1)
        stream = np.full(int(ends[-1]) if len(ends) else 0, eos_token_id, dtype=dtype)
        body = np.ones(len(stream), dtype=bool)
        body[ends - self.lengths - 1] = False
        stream[body] = self.values
        return stream, ends
