"""Splits depend on a document's number alone, so that reading may stop and go on anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.data.sources import Document
from llmnorm.data.splitting import assign_splits, is_validation, split_rule

pytestmark = pytest.mark.fast


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 2), max_size=40), stop=st.integers(0, 40))
def test_reading_may_go_on_after_any_document(lengths: list[int], stop: int) -> None:
    documents = [Document(f"{i}" * length) for i, length in enumerate(lengths)]
    whole = list(assign_splits(iter(documents), 0.25))
    assert len(whole) == len(documents)
    first = whole[:stop]
    filled = sum(any(len(piece.content) for piece in pieces) for pieces in first)
    rest = list(assign_splits(iter(documents[stop:]), 0.25, filled))
    assert [p for p in [*first, *rest] if p[0].content] == [p for p in whole if p[0].content]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 2), max_size=40))
def test_nothing_is_lost_and_both_splits_have_text(lengths: list[int]) -> None:
    documents = [Document("ab" * length) for length in lengths]
    pieces = [p for pieces in assign_splits(iter(documents), 0.25) for p in pieces]
    assert "".join(p.content for p in pieces) == "".join(d.content for d in documents)
    if any(lengths):
        assert {p.split for p in pieces if p.content} == {"train", "val"}


def test_one_of_every_k_documents_is_validation() -> None:
    held_out = [i for i in range(1000) if is_validation(i, 20)]
    assert [i // 20 for i in held_out] == list(range(50))
    assert held_out[0] == 0
    assert len({i % 20 for i in held_out}) > 10  # not the same place in every row
    assert "one of every 20 " in split_rule(0.05)


def test_a_single_row_of_tokens_is_cut_by_position() -> None:
    tokens = np.arange(100)
    ((train, val),) = assign_splits(iter([Document(tokens)]), 0.1)
    assert np.array_equal(train.content, tokens[:90])
    assert np.array_equal(val.content, tokens[90:])


def test_splits_that_are_given_are_kept() -> None:
    documents = [Document("a", "train"), Document("b", "val"), Document("c", "val")]
    found = [pieces[0] for pieces in assign_splits(iter(documents), 0.5)]
    assert found == documents
