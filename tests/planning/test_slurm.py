"""docs/slurm/train.sh, with stand-ins for SLURM's commands that start two nodes on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "slurm" / "train.sh"

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 setsid "$@" & first=$!
SLURM_NODEID=1 setsid "$@" & second=$!
echo "$first $second" > "$STUBS/nodes"
trap 'kill -USR1 $first $second' USR1
code=0
for node in $first $second; do
    wait $node; one=$?
    while kill -0 $node 2>/dev/null; do wait $node; one=$?; done
    [[ $one -gt $code ]] && code=$one
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$STUBS/calls"; fi
"""


@pytest.fixture
def sbatch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the script as SLURM would on two nodes of one process each."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK"))},
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = []

    def start(words: list[str]) -> subprocess.Popen[bytes]:
        with open(tmp_path / "log", "ab") as log:
            started.append(
                subprocess.Popen(
                    ["bash", str(SCRIPT), *words],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return started[-1]

    yield start
    nodes = stubs / "nodes"
    groups = [process.pid for process in started if process.poll() is None]
    groups += map(int, nodes.read_text().split()) if nodes.is_file() else []
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in started:
        process.wait(timeout=10)


def has_recorded(run: Path) -> bool:
    file = run / "metrics.jsonl"
    return file.is_file() and file.stat().st_size > 0


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text(errors="replace")[-3000:]


@pytest.mark.fast
def test_the_script_is_sound_shell():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=10)


def test_two_nodes_train_one_run_that_is_stopped_queued_again_and_finished(sbatch, words, tmp_path):
    run = tmp_path / "run"
    changes = {"training__max_steps": 400, "training__global_batch_size": 2, "data__seq_len": 8}
    job = sbatch(words(**changes))
    deadline = time.monotonic() + 120
    while not has_recorded(run):
        assert job.poll() is None, log_of(tmp_path)
        assert time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 75, log_of(tmp_path)
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 75
    assert 0 < ended["step"] < 400
    assert (tmp_path / "stubs" / "calls").read_text() == f"requeue {os.getpid()}\n"

    assert sbatch(words(**changes)).wait(timeout=180) == 0, log_of(tmp_path)
    assert (run / "final" / "model.safetensors").is_file()
    environment = json.loads((run / "environment.json").read_text())
    assert [environment["world"], environment["restarts"][0]["world"]] == [2, 2]
    assert len((tmp_path / "stubs" / "calls").read_text().splitlines()) == 1


def test_a_wrong_run_file_ends_the_job_before_any_node_starts(sbatch, words, tmp_path):
    assert sbatch(words(optimizer__lr=-1)).wait(timeout=60) == 2
    assert "optimizer.lr" in log_of(tmp_path)
    assert not (tmp_path / "stubs" / "nodes").exists()
