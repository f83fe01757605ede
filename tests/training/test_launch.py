"""`llmnorm train --processes N` starts the ranks, passes signals on and keeps their exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmnorm.data import Prepared
from llmnorm.errors import ConfigError, EnvironmentProblem
from llmnorm.training.checkpoint import verify
from llmnorm.training.launch import launch

from .conftest import tiny_words

STOPPABLE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if os.environ["RANK"] == "1":
    os.kill(int(os.environ["LLMNORM_LAUNCHER"]), signal.SIGTERM)
time.sleep(60)
"""


def _launch(script: str, processes: int = 2) -> int:
    return launch([sys.executable, "-c", script], processes)


def test_each_rank_knows_its_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    write = f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(json.dumps(seen))"
    assert _launch(f"import json, os; seen = [os.environ[n] for n in {names}]; {write}", 3) == 0
    places = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [place[:3] for place in places] == [[str(r), str(r), "3"] for r in range(3)]
    assert len({tuple(place[3:]) for place in places}) == 1


@pytest.mark.parametrize("code", [2, 6])
def test_the_code_of_the_rank_that_failed_is_kept_and_the_others_are_ended(code: int) -> None:
    begun = time.monotonic()
    script = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(CODE); time.sleep(60)"
    assert _launch(script.replace("CODE", str(code))) == code
    assert time.monotonic() - begun < 15


def test_a_signal_reaches_every_rank() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert _launch(STOPPABLE) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_that_were_killed_are_named() -> None:
    with pytest.raises(EnvironmentProblem, match="rank 0 was killed by SIGKILL"):
        _launch("import os; os.kill(os.getpid(), 9)", 1)


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--processes"):
        _launch("")


def test_the_command_trains_with_two_processes(data: Prepared, tmp_path: Path) -> None:
    words = tiny_words(data.path, tmp_path / "run", training__max_steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "llmnorm", "train", "--processes", "2", *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, DistributedDataParallel" in done.stderr
    assert verify(tmp_path / "run" / "checkpoints" / "step_00000002")["world"] == 2
