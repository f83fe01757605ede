"""Runs that are killed at any instant continue as if nothing had happened, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmnorm.data import Prepared

from .conftest import tiny_words

SERVER = Path(__file__).with_name("kill_server.py")


def _trials(data: Prepared, folder: Path, kind: str, trials: int, **changes: Any) -> dict[str, Any]:
    words = folder / "words.json"
    words.write_text(json.dumps(tiny_words(data.path, folder / "unused", **changes)[:-2]))
    done = subprocess.run(
        [sys.executable, str(SERVER), str(words), kind, str(trials), "20261120"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr[-3000:]}


def test_a_run_killed_at_random_moments_ends_with_equal_numbers_and_files(
    data: Prepared, tmp_path: Path
) -> None:
    result = _trials(data, tmp_path, "moment", 16, checkpoint__interval_steps=1)
    assert result["wrong"] == [], result["log"]
    assert result["kills"] >= 12


def test_a_run_killed_at_file_operations_ends_with_equal_numbers_and_files(
    data: Prepared, tmp_path: Path
) -> None:
    changes = {"training__max_steps": 4, "checkpoint__interval_steps": 1}
    result = _trials(data, tmp_path, "operation", 24, **changes)
    assert result["wrong"] == [], result["log"]
    assert result["kills"] == 24
    assert result["operations"] >= 24
