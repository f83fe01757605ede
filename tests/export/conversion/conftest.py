"""A small corpus and a model that was trained on it for a moment."""

from pathlib import Path

import pytest

from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.training.loop import train

from ...training.conftest import prepare_corpus, tiny_words


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The corpus, prepared once."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    changes = {
        "training__max_steps": 60,
        "eval__interval_steps": 0,
        "checkpoint__interval_steps": 0,
    }
    train(load_run_config(None, tiny_words(data.path, run, **changes)))
    return run
