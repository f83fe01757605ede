"""What a run stood on: versions, commit, machine, data, parameter counts, command line."""

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import llmnorm
from llmnorm.training.ranks import Ranks

_PACKAGES = (
    "llmnorm", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "triton"
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of llmnorm's checkout, with `-dirty` after local edits, if it is one."""
    git = shutil.which("git")
    folder = Path(llmnorm.__file__).parent
    if git is None or not (folder.parent / ".git").exists():
        return None
    answer = subprocess.run(
        [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def device_name(device: torch.device) -> str:
    """Return the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of parameters, with and without embedding and head.

    A head that shares the embedding's matrix is counted once.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(p): p.numel() for module in modules for p in module.parameters()}
    return {"total": total, "non_embedding": total - sum(ends.values())}


def flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Return floating-point operations of training on one token: 6 N + 12 L d T.

    N counts the matrices that a token passes (all parameters but the embedding table), L layers,
    d width, T sequence length; attention is counted without the causal half.
    Source: Chowdhery et al., "PaLM", appendix B, arXiv:2204.02311.
    """
    config = model.config
    head = sum(parameter.numel() for parameter in model.get_output_embeddings().parameters())
    passed = parameter_counts(model)["non_embedding"] + head
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return 6.0 * passed + attention


def start_record(ranks: Ranks) -> dict[str, Any]:
    """Return what is true of this start of the run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "world": ranks.world,
        "device": device_name(ranks.device),
        "device_type": ranks.device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
