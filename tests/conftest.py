"""Settings and fixtures shared by the whole suite."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
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


def _clean_environment(extra: dict[str, str]) -> dict[str, str]:
    launcher = ("ACCELERATE_", "FSDP_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | extra


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a script as N ranks of one gloo group; returns each rank's output.

    Every rank leads a process group of its own, which is killed when any rank fails or time is up.
    """

    def run(
        script: Path | str, *args: object, world: int = 2, timeout: float = 90, **env: str
    ) -> list[str]:
        port, ranks, logs = _free_port(), [], [tmp_path / f"rank{r}.log" for r in range(world)]
        verdict = None
        try:
            for rank in range(world):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                place |= {"LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
                place = {key: str(value) for key, value in place.items()}
                with logs[rank].open("wb") as log:
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, str(script), *map(str, args)],
                            env=_clean_environment(place | {"MASTER_ADDR": "127.0.0.1"} | env),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            end = time.monotonic() + timeout
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() not in (None, 0) for rank in ranks):
                    verdict = "a rank failed"
                    break
                if time.monotonic() > end:
                    verdict = f"not done after {timeout} s"
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
        if verdict is None and any(rank.returncode for rank in ranks):
            verdict = "a rank failed"
        tails = "\n".join(f"--- rank {r}\n{text[-2000:]}" for r, text in enumerate(outputs))
        assert verdict is None, f"{verdict}\n{tails}"
        return outputs

    return run
