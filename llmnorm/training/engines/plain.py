"""The plain engine: one process, or one model a process with averaged gradients (DDP)."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from llmnorm.errors import EnvironmentProblem
from llmnorm.processes import leave_process_group
from llmnorm.training.engines import MicroBatch
from llmnorm.training.engines.native import NativeEngine
from llmnorm.training.objective import Objective
from llmnorm.training.ranks import Ranks, launched

PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: rank 0 reads all data and checkpoints before it begins."""


class PlainEngine(NativeEngine):
    """Holds a whole copy of the model in every process.

    accelerate opens the process group and wraps the objective.

    Args:
        cpu: run on the CPU. accelerate must be told so at construction: left to itself it starts
            two CPU processes that do not talk to each other.

    Raises:
        EnvironmentProblem: if the processes are not those that the launcher started.
    """

    name = "plain"

    def __init__(self, *, cpu: bool) -> None:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        group = InitProcessGroupKwargs(timeout=PATIENCE)
        self.accelerator = Accelerator(
            cpu=cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=[ddp, group]
        )
        world = self.accelerator.num_processes
        super().__init__(Ranks(self.accelerator.process_index, world, self.accelerator.device))
        self._settled = False
        check_world(world)

    def wrap(self, objective: Objective) -> Any:
        """Place the model; wrap it in DDP when there are several processes.

        Raises:
            EnvironmentProblem: if accelerate did otherwise.
        """
        if self.ranks.world == 1:  # accelerate wraps also one process that a launcher started
            return objective.to(self.ranks.device)
        with warnings.catch_warnings():  # its successor is unknown to accelerate and older torch
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped = self.accelerator.prepare_model(objective)
        if not isinstance(wrapped, DistributedDataParallel):
            raise EnvironmentProblem(
                f"{self.ranks.world} processes hold a {type(wrapped).__name__}, expected "
                "DistributedDataParallel: their gradients would not be averaged"
            )
        return wrapped

    def backward(self, micro_batches: list[MicroBatch], count: float) -> Tensor:
        """As in `NativeEngine`; before the first one DDP settles its buckets.

        It orders them anew after its first backward pass, and with more than two ranks another
        order of sums is another rounding: the first step of a continued run would differ. So the
        first micro-batch is passed through once for nothing.
        """
        if self.ranks.world > 1 and not self._settled:
            self._settled = True
            cuda = [self.ranks.device] if self.ranks.device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):
                super().backward(micro_batches[:1], count)
            self.optimizer.zero_grad()
        return super().backward(micro_batches, count)

    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        """Gradients travel with the last micro-batch alone."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def finish(self, folder: Path | None) -> None:
        """Write the model on rank 0, then leave the process group.

        DDP goes before the group: if it held the last reference, the group would be torn down
        while Python's lock is held, which its worker threads may be waiting for (a rare deadlock).
        """
        if folder is not None and self.ranks.is_main:
            transformers_logging.disable_progress_bar()
            self.model.save_pretrained(folder)
        self.wrapped = None
        self.accelerator.free_memory()
        leave_process_group()


def check_world(world: int) -> None:
    """Compare the processes that found each other with those that were started.

    Raises:
        EnvironmentProblem: if they differ.
    """
    started = launched("WORLD_SIZE", 1)
    if world != started:
        raise EnvironmentProblem(
            f"the launcher started {started} processes but {world} found each other; "
            "use a file of configs/accelerate/"
        )
