"""Settings and fixtures shared by the whole suite."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with golden vectors and real text beside the checkout; skips when it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: this test reads real text or golden vectors from it")
    return SHARED
