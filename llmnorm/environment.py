"""Facts that stand beside every number: versions, commit, processor, size of a model."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_PACKAGES = (
    "llmnorm", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "triton"
)  # fmt: skip


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of what numbers depend on, and of `packages`."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of llmnorm's checkout, with `-dirty` after local edits, if it is one."""
    git = shutil.which("git")
    folder = Path(__file__).parent
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
    """Return the number of parameters, with and without embeddings and head.

    Learned positions are an embedding. A head that shares the embedding's matrix is counted once.
    """
    total = sum(elements(parameter) for parameter in model.parameters())
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    modules = (*tables, model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(p): elements(p) for module in modules for p in module.parameters()}
    return {"total": total, "non_embedding": total - sum(ends.values())}


def elements(parameter: Any) -> int:
    """Return the size of a parameter, also of one that ZeRO-3 has emptied."""
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was refused: on a GPU, on the CPU, or to a new thread."""
    refused = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("can't allocate memory", "can't start new thread")
    return refused or any(word in str(error) for word in words)
