"""docs/schemes.md and its drawings are what the code says today."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_and_the_drawings_of_schemes_are_current():
    spec = importlib.util.spec_from_file_location("make_schemes", DOCS / "make_schemes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = script.pages()
    drawn = {f"schemes/{path.name}" for path in (DOCS / "schemes").glob("*.svg")}
    assert {"schemes.md", *drawn} == set(files), "run: python docs/make_schemes.py"
    for path, text in files.items():
        assert (DOCS / path).read_bytes() == text.encode(), f"{path}: run docs/make_schemes.py"
