"""torch.compile, one region a block.

Whole-model compilation costs seconds a layer; block by block all layers share one graph. Blocks
are compiled in place, so state-dict names stay as they are.
"""

import logging
from typing import Any

import torch

from llmnorm.training.objective import Objective

logger = logging.getLogger(__name__)


def compiler_problem(device: torch.device) -> str | None:
    """Return why nothing can be compiled for `device` (None: it can), by compiling a tiny sum.

    The usual causes are a missing C++ compiler, missing Python headers, or no triton on a GPU.
    """

    def tiny(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + 1.0

    try:
        torch.compile(tiny, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever the backend raises: the run goes on without it
        torch.compiler.reset()
        text = str(error).strip() or type(error).__name__
        return text.splitlines()[0][:200]
    return None


def decide_compile(requested: str | bool, device: torch.device) -> bool:
    """Return whether to compile; one notice when that was asked for and cannot be.

    Args:
        requested: True, False, or "auto": on GPUs alone, since short runs on a CPU do not earn
            back the seconds that compiling costs.
        device: where the model runs.
    """
    if requested is False or (requested == "auto" and device.type != "cuda"):
        return False
    problem = compiler_problem(device)
    if problem is not None:
        logger.warning("torch.compile does not work here, training runs eagerly: %s", problem)
    return problem is None


def compile_blocks(objective: Objective) -> None:
    """Compile each layer of the trunk (and a teacher's) in place, and the head with the loss."""
    trunks: list[Any] = objective.trunks()
    for trunk in trunks:
        for layer in trunk.layers:
            layer.compile()
    objective.chunk_loss = torch.compile(objective.chunk_loss)  # type: ignore[method-assign]
