"""A small corpus and run files for the tests of planning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.sources import Text

TEXT = "the norm of a residual stream grows with depth and every branch adds its own part to it"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """About 7,000 tokens in 400 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    words = TEXT.split()
    documents = [" ".join(words[i % 7 :] + words[: i % 11]) + f" {i}" for i in range(400)]
    (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    options = PrepareOptions(vocab_size=300, val_fraction=0.05)
    return prepare(Text(folder / "corpus.txt", whole_files=False), folder / "prepared", options)


@pytest.fixture
def words(data: Prepared, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a small run; changes name keys with `__` for the dot."""

    def make(**changes: Any) -> list[str]:
        values: dict[str, Any] = {
            "model.preset": "debug",
            "data.path": str(data.path),
            "data.seq_len": 64,
            "optimizer.lr": 0.001,
            "training.max_steps": 3,
            "training.global_batch_size": 6,
            "training.precision": "fp32",
            "training.compile": False,
            "eval.max_documents": 2,
            "eval.batch_size": 1,
            "checkpoint.overlap": False,
            "output.dir": str(tmp_path / "run"),
        }
        values.update({key.replace("__", "."): value for key, value in changes.items()})
        return [word for key, v in values.items() for word in (f"--{key}", json.dumps(v))]

    return make
