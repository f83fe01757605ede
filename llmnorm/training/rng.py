"""Random generators and determinism: seeds, and states as tensors so that no pickle is needed."""

import os
import random

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prefer_determinism(device: torch.device) -> None:
    """Ask torch for kernels that give the same bits twice; what has none warns once and runs.

    On a CPU all kernels that training uses do. On a GPU attention's backward does when asked, and
    cuBLAS with a workspace of fixed size, which is read when its first product runs.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def rng_tensors() -> dict[str, Tensor]:
    """Return the states of Python's, numpy's and torch's generators (of the GPU too)."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.tensor([int(word) for word in keys], dtype=torch.int64),
        "numpy.position": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy.gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, Tensor]) -> None:
    """Set all generators to the states of `rng_tensors`."""
    version, *words = states["python.words"].tolist()
    gauss = states["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    keys = np.array(states["numpy.words"].tolist(), dtype=np.uint32)
    position, has_gauss = states["numpy.position"].tolist()
    cached = states["numpy.gauss"].item()
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    torch.set_rng_state(states["torch.cpu"].clone())
    if torch.cuda.is_available() and "torch.cuda" in states:
        torch.cuda.set_rng_state(states["torch.cuda"].clone())
