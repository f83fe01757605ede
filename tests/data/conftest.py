"""Small corpora for the tests of llmnorm/data."""

from pathlib import Path

import numpy as np
import pytest

from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.sources import Text

WORDS = [
    *("the", "norm", "of", "a", "residual", "stream", "grows", "with", "depth", "while", "every"),
    *("branch", "adds", "its", "own", "part", "and", "gains", "déjà-vu", "naïve", "数", "🙂"),
    *("def", "return", "self", "import", "class"),
]


def make_documents(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Documents of words in random order, some with several lines."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS, size=int(rng.integers(1, words)))) + ("\nend" if i % 3 else "")
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents separated by blank lines."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(make_documents(300)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The text file prepared in several shards."""
    options = PrepareOptions(vocab_size=300, val_fraction=0.1, shard_tokens=2000)
    return prepare(
        Text(text_file, whole_files=False), tmp_path_factory.mktemp("out") / "p", options
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
