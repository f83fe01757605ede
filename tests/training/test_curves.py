"""Short runs give the losses that are committed: a change of the trainer cannot pass unseen."""

import json
from pathlib import Path

import pytest

from llmnorm.data import Prepared

from .conftest import tiny_words
from .curves import FILE, RUNS, curve, stack, tokens_hash

ELSEWHERE = 1e-5  # relative; other processors and torch versions round differently


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_committed(name: str, data: Prepared, tmp_path: Path) -> None:
    record = json.loads(FILE.read_text())
    assert tokens_hash(data) == record["tokens"], "the prepared tokens changed, not the trainer"
    found = curve(data, tmp_path / "run", tiny_words(data.path, tmp_path / "run", **RUNS[name]))
    expected = record["curves"][name]
    if stack().items() <= record.items():
        assert found == expected
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=ELSEWHERE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=100 * ELSEWHERE)
