"""docs/conversion.md says what benchmarks/conversion.py measured."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_made_of_the_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("conversion")
    record = json.loads((ROOT / "benchmarks" / "results" / "conversion.json").read_text())
    page = (ROOT / "docs" / "conversion.md").read_text()
    assert script.table(record) == page.partition(script.BEGIN)[2].partition(script.END)[0].strip()
    for found in record["arms"].values():
        for how, gap in found["gap"].items():
            assert gap == pytest.approx(found[how] - record["kept"][how])
