"""Look at this machine as a run would: one line for each thing that training needs or can use.

Every check really does what it speaks of: the disk is synced, two processes exchange a tensor, the
compiler compiles. Exit code 0 unless something that training needs is broken (then 3). What is
merely missing, or slower than it could be, is a warning and says what to do.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmnorm.config.problems import one_line
from llmnorm.environment import device_name, versions
from llmnorm.errors import EnvironmentProblem
from llmnorm.training.compiling import compiler_problem

OK, WARNING, PROBLEM = "ok", "warning", "problem"

_FLOORS = {"torch": (2, 11), "transformers": (5, 20)}
_SYNCED_BYTES = 16 * 2**20
_SLOW_SYNC = 20.0  # MB/s
_LITTLE_DISK, _LITTLE_SHARED = 5e9, 64e6  # bytes
_PATIENCE = 60  # seconds for two processes to start and exchange a tensor

_EXCHANGE = """
import datetime, sys, torch
import torch.distributed as dist
backend, store, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
wait = datetime.timedelta(seconds=40)
if backend == "nccl":
    torch.cuda.set_device(rank)
group = dict(init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait)
dist.init_process_group(backend, **group)
value = torch.full((1024,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(value)
assert value.cpu().unique().tolist() == [world * (world + 1) / 2], value
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Args:
        name: what was looked at.
        state: ok, warning or problem.
        text: what was seen; for anything but ok also what to do.
    """

    name: str
    state: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder whose disk is tried."""
    parser.add_argument("--dir", type=Path, default=Path(), help="try this folder's disk (here)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line a check; fail if training cannot work here."""
    findings = []
    for finding in examine(args.dir):
        findings.append(finding)
        if not args.json:
            sys.stdout.write(f"{finding.state:<8} {finding.name:<18} {finding.text}\n")
            sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    broken = [finding.name for finding in findings if finding.state == PROBLEM]
    if broken:
        raise EnvironmentProblem(f"training does not work here: see {', '.join(broken)}")
    return 0


def examine(folder: Path) -> Iterator[Finding]:
    """Do all checks; one that fails by itself is a problem, and the others still run."""
    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "bfloat16": _bfloat16,
        "threads": _threads,
        "compiler": _compiler,
        "engine ddp": _ddp,
        "engine fsdp2": _fsdp2,
        "engine zero": _zero,
        "flash attention": _flash_attention,
        "disk": lambda: _disk(folder),
        "shared memory": _shared_memory,
        "all-reduce": _all_reduce,
    }
    for name, check in checks.items():
        try:
            state, text = check()
        except Exception as error:  # whatever is broken here is what is asked for
            state, text = PROBLEM, f"{type(error).__name__}: {error}"
        yield Finding(name=name, state=state, text=one_line(" ".join(text.split())))


def _versions() -> tuple[str, str]:
    found = versions()
    for package, floor in _FLOORS.items():
        seen = tuple(int(part) for part in found[package].split("+")[0].split(".")[:2])
        if seen < floor:
            wanted = ".".join(map(str, floor))
            return PROBLEM, f"{package} is {found[package]}; pip install '{package}>={wanted}'"
    return OK, ", ".join(f"{package} {number}" for package, number in found.items())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _devices() -> tuple[str, str]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = min(torch.cuda.mem_get_info(index)[0] for index in range(count))
        return OK, f"{count} x {device_name(_device())}, {memory / 1e9:.3g} GB free on each"
    if shutil.which("nvidia-smi") is not None:
        return WARNING, (
            f"nvidia-smi is here but torch {torch.__version__} sees no GPU; install torch's CUDA "
            "build for this driver"
        )
    return OK, f"{device_name(_device())}, no GPU: small models only"


def _bfloat16() -> tuple[str, str]:
    device = _device()
    x = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    if (x @ x)[0, 0].item() != 64:
        return PROBLEM, "a bfloat16 product is wrong; use training.precision: fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return WARNING, "this GPU only emulates bfloat16; training.precision: auto takes fp32"
    return OK, "works; training.precision: auto decides by device, on a CPU by measurement"


def _threads() -> tuple[str, str]:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if threads > cores:
        return WARNING, f"torch uses {threads} threads on {cores} cores; set OMP_NUM_THREADS"
    return OK, f"{threads} threads on {cores} cores"


def _compiler() -> tuple[str, str]:
    problem = compiler_problem(_device())
    if problem is None:
        return OK, "torch.compile works"
    return (
        WARNING,
        f"torch.compile does not work, runs are eager: {problem}; install a C++ compiler",
    )


def _ddp() -> tuple[str, str]:
    if not torch.distributed.is_available():
        return PROBLEM, "this torch has no distributed package; install an official build"
    nccl = ", nccl" if torch.cuda.is_available() and torch.distributed.is_nccl_available() else ""
    return OK, f"gloo{nccl}: configs/accelerate/ddp.yaml"


def _fsdp2() -> tuple[str, str]:
    if importlib.util.find_spec("torch.distributed.fsdp") is None:
        return WARNING, "this torch has no torch.distributed.fsdp; install an official build"
    from torch.distributed.fsdp import fully_shard

    return OK, f"{fully_shard.__name__}: configs/accelerate/fsdp2.yaml"


def _zero() -> tuple[str, str]:
    """Ask in a process of its own: importing DeepSpeed changes this one."""
    if importlib.util.find_spec("deepspeed") is None:
        return WARNING, "DeepSpeed is not installed; for ZeRO: pip install 'llmnorm[deepspeed]'"
    code = "import deepspeed; print(deepspeed.__version__)"
    done = _python(
        "-c", code, variables={} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    )
    if done.returncode:
        return WARNING, f"DeepSpeed is installed but not importable: {_last_line(done.stderr)}"
    return OK, f"DeepSpeed {_last_line(done.stdout)}: configs/accelerate/zero1.yaml to zero3.yaml"


def _flash_attention() -> tuple[str, str]:
    device = _device()
    q = torch.randn(1, 2, 32, 64, device=device, dtype=torch.bfloat16)
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    try:
        with torch.nn.attention.sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError as error:
        return WARNING, f"torch's flash kernel does not run here, others are used: {error}"
    own = importlib.util.find_spec("flash_attn") is not None
    return OK, "torch's own kernel runs" + (", and the package flash-attn is here" if own else "")


def _disk(folder: Path) -> tuple[str, str]:
    free = shutil.disk_usage(folder).free
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmnorm-doctor-") as file:
        begun = time.perf_counter()
        file.write(os.urandom(_SYNCED_BYTES))
        file.flush()
        os.fsync(file.fileno())
        rate = _SYNCED_BYTES / (time.perf_counter() - begun) / 1e6
    seen = f"{folder.resolve()}: {free / 1e9:.3g} GB free, {rate:.3g} MB/s synced"
    if free < _LITTLE_DISK:
        return WARNING, f"{seen}; make room: a checkpoint takes 12 bytes a parameter"
    if rate < _SLOW_SYNC:
        return WARNING, f"{seen}: saving will be slow; choose a faster disk for output.dir"
    return OK, seen


def _shared_memory() -> tuple[str, str]:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return WARNING, "there is no /dev/shm to write; set data.num_workers: 0"
    free = shutil.disk_usage(folder).free
    if free < _LITTLE_SHARED:
        return WARNING, f"{free / 1e6:.3g} MB free; docker run --shm-size=1g, or num_workers: 0"
    return OK, f"{free / 1e9:.3g} GB free"


def _all_reduce() -> tuple[str, str]:
    """Let processes of this machine sum a tensor: two by gloo, or one a GPU by NCCL."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, world = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _processes() as started:
        for rank in range(world):
            words = [backend, f"{folder}/store", str(rank), str(world)]
            with open(f"{folder}/{rank}", "wb") as log:
                command = [sys.executable, "-c", _EXCHANGE, *words]
                started.append(subprocess.Popen(command, stdout=log, stderr=log))
        late = False
        for process in started:
            try:
                process.wait(timeout=max(0.1, begun + _PATIENCE - time.perf_counter()))
            except subprocess.TimeoutExpired:
                late = True
        seconds = time.perf_counter() - begun
        if late:
            return PROBLEM, (
                f"{world} processes did not exchange a tensor by {backend} within {_PATIENCE} s; "
                "look at the firewall, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
        for rank, process in enumerate(started):
            if process.returncode:
                text = Path(folder, str(rank)).read_text(errors="replace")
                return PROBLEM, f"{backend}, rank {rank}: {_last_line(text)}"
    return OK, f"{world} processes by {backend}, {seconds:.1f} s with their start"


@contextmanager
def _processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _python(*words: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
        env=environment,
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
