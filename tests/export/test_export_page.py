"""The tables of docs/export.md are what the code says today, but for the numbers measured."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_of_the_page_are_current():
    spec = importlib.util.spec_from_file_location(
        "make_export_table", DOCS / "make_export_table.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    found = script.NUMBER.sub("exact", text)
    assert found == script.NUMBER.sub("exact", script.page(text, script.tables(measure=False))), (
        "run: python docs/make_export_table.py"
    )
    begin, end = text.index(script.BEGIN), text.index(script.END)
    measured = script.NUMBER.findall(text[begin:end])
    assert len(measured) >= 60  # two of each scheme that a class holds
    assert max(float(n.removeprefix("< ").replace("exact", "0")) for n in measured) <= 1e-3
