"""Engines: who holds the weights, averages gradients and steps the optimizer.

One protocol of six verbs; the loop knows no more about the engine than this. The launcher's file
chooses the engine, the run file everything that changes numbers.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmnorm.errors import EnvironmentProblem, LlmNormError
from llmnorm.training.objective import Objective
from llmnorm.training.pieces import Piece
from llmnorm.training.precision import Precision
from llmnorm.training.ranks import Ranks

logger = logging.getLogger(__name__)

MicroBatch = dict[str, Tensor]
MakeOptimizer = Callable[[PreTrainedModel], Any]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outcome of an optimizer step, the same on every rank.

    Args:
        loss: mean over the global batch's target tokens, in nats.
        grad_norm: Euclidean norm of the global gradient before clipping.
        applied: False when loss or norm was not finite; then nothing changed.
    """

    loss: float
    grad_norm: float
    applied: bool


class Engine(Protocol):
    """The six verbs, and where this process stands.

    Args:
        name: what the checkpoint's manifest calls the engine.
        ranks: the processes of the run.
    """

    name: str
    ranks: Ranks

    def prepare(
        self, objective: Objective, make_optimizer: MakeOptimizer, precision: Precision
    ) -> None:
        """Take the model in: place, wrap and check it, and make the optimizer for it."""

    def backward(self, micro_batches: list[MicroBatch], count: float) -> Tensor:
        """Accumulate the gradient of (loss sum of the global batch / `count`).

        Returns this rank's loss sum, a float64 scalar.
        """

    def clip_and_step(
        self, loss_sum: Tensor, count: float, *, factor: float, max_norm: float, step: int
    ) -> StepResult:
        """Clip to `max_norm` (0: off) and step at `factor` times each group's learning rate.

        `step` numbers the steps that were applied, from 1; `constraints.py` goes by it.
        """

    def pieces(self) -> Iterator[Piece]:
        """Yield what this rank owns of weights and optimizer state, without a collective."""

    def load_pieces(self, folder: Path) -> None:
        """Set weights and optimizer state from a verified checkpoint of any engine and world."""

    def finish(self, folder: Path | None) -> None:
        """Write the weights as a Hugging Face folder (None: do not) and leave the group."""


_NOT_THE_LAUNCHERS = {
    "ACCELERATE_MIXED_PRECISION": ("no", "training.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "training.compile"),
}
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def choose_engine() -> Engine:
    """Return the engine that the launcher asked for.

    Raises:
        EnvironmentProblem: if the launcher asked for one that there is not, or for two at once, or
            the processes cannot form a group.
    """
    try:
        engine = _choose()
        engine.ranks.sums(1)  # NCCL connects in the first collective
    except RuntimeError as error:
        if isinstance(error, LlmNormError):
            raise
        raise EnvironmentProblem(
            f"the processes cannot form a group: {str(error).partition(chr(10))[0]:.160}; "
            "llmnorm doctor looks at GPUs and network"
        ) from error
    return engine


def _choose() -> Engine:
    cpu = asked("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    kind = asked_kind()
    if kind == "deepspeed":
        from llmnorm.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(cpu=cpu)
    if kind == "fsdp2":
        from llmnorm.training.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(cpu=cpu)
    from llmnorm.training.engines.plain import PlainEngine

    return PlainEngine(cpu=cpu)


def asked_kind(environment: Mapping[str, str] = os.environ) -> str:
    """Return the module of the engine that a launcher's environment asks for.

    Raises:
        EnvironmentProblem: if there is no such engine, or it asks for two at once.
    """
    for variable, (default, key) in _NOT_THE_LAUNCHERS.items():
        if (value := environment.get(variable, default)).lower() != default:
            logger.warning("%s=%s of the launcher is not used: %s decides", variable, value, key)
    for variable, what in _UNSUPPORTED.items():
        if asked(variable, environment):
            raise EnvironmentProblem(
                f"the launcher asked for {what}; the engines are one process, DDP, FSDP2 and "
                "DeepSpeed ZeRO: use a file of configs/accelerate/"
            )
    deepspeed = asked("ACCELERATE_USE_DEEPSPEED", environment)
    fsdp = asked("ACCELERATE_USE_FSDP", environment)
    if deepspeed and fsdp:
        raise EnvironmentProblem(
            "the launcher asked for DeepSpeed and FSDP at once; use one file of configs/accelerate/"
        )
    return "deepspeed" if deepspeed else "fsdp2" if fsdp else "plain"


def asked(variable: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher set a variable of its environment to true."""
    return environment.get(variable, "false").lower() in ("true", "1", "yes")
