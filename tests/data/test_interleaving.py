"""Parts of a mixture get their shares of any stretch of the stream."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.data import Interleaving

pytestmark = pytest.mark.fast

WEIGHTS = st.lists(st.decimals("0.001", "1000", places=3).map(Fraction), min_size=1, max_size=6)


def test_thirds_are_dealt_in_turn() -> None:
    two_to_one = Interleaving([Fraction(2), Fraction(1)])
    assert [two_to_one.place(k)[0] for k in range(9)] == [1, 0, 0] * 3
    even = Interleaving([Fraction(1)] * 3)
    assert all({even.place(3 * k + i)[0] for i in range(3)} == {0, 1, 2} for k in range(20))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=WEIGHTS, length=st.integers(0, 400))
def test_a_part_has_its_share_of_every_beginning_and_numbers_it_in_order(
    weights: list[Fraction], length: int
) -> None:
    interleaving = Interleaving(weights)
    parts, positions = interleaving.many(np.arange(length))
    assert parts.shape == positions.shape == (length,)
    found = Counter(parts.tolist())
    assert interleaving.counts(length) == [found[part] for part in range(len(weights))]
    for part, weight in enumerate(weights):
        assert positions[parts == part].tolist() == list(range(found[part]))
        away = abs(found[part] - length * weight / sum(weights))
        assert away < max(1, len(weights) - 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=WEIGHTS, index=st.integers(0, 2**60))
def test_shares_are_exact_however_far_the_stream_has_come(
    weights: list[Fraction], index: int
) -> None:
    interleaving = Interleaving(weights)
    before, after = interleaving.counts(index), interleaving.counts(index + 1)
    part, position = interleaving.place(index)
    assert before[part] == position
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        int(other == part) for other in range(len(weights))
    ]
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - index * weight / sum(weights)) < max(1, len(weights) - 1)
