"""The order of samples: a keyed permutation per epoch, computed, never stored or shuffled.

Any process can ask for the sample at any stream index without having seen the ones before, so
resuming and changing the number of processes cost nothing. `batches.py` is the user.
"""

import hashlib
from functools import lru_cache

import numpy as np

_ROUNDS = 6
# Constants of splitmix64's finalizer (Steele, Lea, Flood 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class SampleOrder:
    """Map a stream index to a sample: `index = epoch * samples + i` gives epoch's i-th sample.

    A balanced Feistel network permutes the smallest even-bit domain that holds `samples`; values
    that fall outside are encrypted again until they fall inside (cycle walking), which is a
    permutation of `0 .. samples - 1`. The domain is less than four times `samples`, so a value
    takes fewer than four turns on average. Keys come from BLAKE2b of (seed, epoch, round).

    Args:
        samples: number of samples in an epoch.
        seed: every seed gives another order.
        part: of a mixture, each of which has an order of its own.

    Raises:
        ValueError: if ``samples < 1``.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """

    def __init__(self, samples: int, seed: int, part: int = 0) -> None:
        if samples < 1:
            raise ValueError(f"an order needs at least one sample, got {samples}")
        self.samples = samples
        self._key = f"{seed}|{part}" if part else f"{seed}"
        self._half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)

    def __call__(self, index: int) -> int:
        """The sample at one stream index."""
        return int(self.many(np.array([index]))[0])

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The samples at many stream indices, (count,) int64 to (count,) int64."""
        epochs, positions = np.divmod(np.asarray(indices, dtype=np.int64), self.samples)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permute(positions[chosen], _keys(self._key, int(epoch)))
        return result

    def _permute(self, positions: np.ndarray, keys: tuple[np.uint64, ...]) -> np.ndarray:
        values = self._encrypt(positions.astype(np.uint64), keys)
        while (outside := values >= self.samples).any():
            values[outside] = self._encrypt(values[outside], keys)
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray, keys: tuple[np.uint64, ...]) -> np.ndarray:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=64)
def _keys(key: str, epoch: int) -> tuple[np.uint64, ...]:
    digests = (
        hashlib.blake2b(f"sample order|{key}|{epoch}|{turn}".encode(), digest_size=8).digest()
        for turn in range(_ROUNDS)
    )
    return tuple(np.uint64(int.from_bytes(digest, "little")) for digest in digests)
