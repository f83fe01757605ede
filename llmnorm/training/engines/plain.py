"""The plain engine: one process, or one model a process with averaged gradients (DDP)."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from llmnorm.errors import CheckpointError, ConfigError, EnvironmentProblem
from llmnorm.processes import leave_process_group
from llmnorm.training.constraints import Constraints
from llmnorm.training.engines import MakeOptimizer, MicroBatch, StepResult
from llmnorm.training.objective import Objective
from llmnorm.training.pieces import Owned, Piece, PieceReader, share
from llmnorm.training.precision import Precision
from llmnorm.training.ranks import Ranks

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: rank 0 reads all data and checkpoints before it begins."""
_GROUPS = "param_groups"
"""Pseudo-parameter under which the numbers of the optimizer's groups are saved."""
_NUMBER = ":number"
"""Ending of a slot that is a Python number, saved as a 0-d tensor."""


class PlainEngine:
    """Holds a whole copy of the model in every process.

    accelerate opens the process group and wraps the objective; autocast, accumulation and clipping
    are done here, once each. Every rank holds everything, so `pieces` deals it out evenly.

    Args:
        cpu: run on the CPU. accelerate must be told so at construction: left to itself it starts
            two CPU processes that do not talk to each other.

    Raises:
        EnvironmentProblem: if the processes are not those that the launcher started.
    """

    name = "plain"

    def __init__(self, *, cpu: bool) -> None:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        group = InitProcessGroupKwargs(timeout=_PATIENCE)
        self.accelerator = Accelerator(
            cpu=cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=[ddp, group]
        )
        world = self.accelerator.num_processes
        self.wrapped: Any = None
        self.ranks = Ranks(self.accelerator.process_index, world, self.accelerator.device)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if world != launched:
            raise EnvironmentProblem(
                f"the launcher started {launched} processes but {world} found each other; "
                "use configs/accelerate/ddp.yaml"
            )

    def prepare(
        self, objective: Objective, make_optimizer: MakeOptimizer, precision: Precision
    ) -> None:
        """Place the model, wrap it in DDP when there are several processes, make the optimizer."""
        self.model = objective.model
        self.precision = precision
        with warnings.catch_warnings():  # its successor is unknown to accelerate and older torch
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped = self.accelerator.prepare_model(objective)
        parallel = isinstance(self.wrapped, DistributedDataParallel)
        if parallel != (self.ranks.world > 1):
            raise EnvironmentProblem(
                f"{self.ranks.world} processes hold a {type(self.wrapped).__name__}, expected "
                "DistributedDataParallel for several: their gradients would not be averaged"
            )
        if parallel:
            logger.info("%d processes, DistributedDataParallel", self.ranks.world)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer: Any = make_optimizer(self.model)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.constraints = Constraints(self.model, self.ranks.mean)

    def backward(self, micro_batches: list[MicroBatch], count: float) -> Tensor:
        """Accumulate over the micro-batches; gradients travel with the last one alone.

        DDP averages over ranks, so the loss is multiplied by their number first.
        """
        device = self.ranks.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, batch in enumerate(micro_batches, start=1):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            last = number == len(micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.precision.autocast():
                    loss_sum, _ = self.wrapped(**batch)
                (loss_sum * (self.ranks.world / max(count, 1.0))).backward()
            total += loss_sum.detach()
        return total

    def clip_and_step(
        self, loss_sum: Tensor, count: float, *, factor: float, max_norm: float, step: int
    ) -> StepResult:
        """Agree on loss and soundness of the step, then clip and step, or leave all untouched."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        unsound = 0.0 if torch.isfinite(norm) else 1.0
        total, unsound = self.ranks.sums(loss_sum.item(), unsound)
        loss = total / count if count else math.nan
        applied = not unsound and math.isfinite(loss)
        if applied:
            if max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_norm, norm)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
            with self.constraints.around(step):
                self._step()
        self.optimizer.zero_grad()
        return StepResult(loss=loss, grad_norm=norm.item(), applied=applied)

    def _step(self) -> None:
        """Step the optimizer; one that cannot do its first step is the run file's mistake."""
        first = not self.optimizer.state
        try:
            self.optimizer.step()
        except (TypeError, ValueError, RuntimeError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError):
                raise
            seen = str(error).partition("\n")[0]
            raise ConfigError(
                f"{type(self.optimizer).__name__} fails in its first step ({seen}); change "
                "optimizer.name or optimizer.options"
            ) from error

    def pieces(self) -> Iterator[Piece]:
        """Yield an even share of weights, optimizer state and group numbers."""
        weights = [
            Owned(name=name, slot="", tensor=p, split=True) for name, p in self.parameters.items()
        ]
        yield from share(weights, self.ranks.rank, self.ranks.world)
        yield from share([*self._slots(), *self._numbers()], self.ranks.rank, self.ranks.world)

    def _slots(self) -> Iterator[Owned]:
        state = self.optimizer.state
        for name, parameter in self.parameters.items():
            for slot, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    like = value.shape == parameter.shape and value.ndim > 0
                    yield Owned(name=name, slot=slot, tensor=value, split=like)
                elif isinstance(value, int | float):
                    yield _number(name, slot, value)
                elif value is not None:
                    raise ConfigError(
                        f"{type(self.optimizer).__name__} keeps a {type(value).__name__} in state "
                        f"{slot!r}; a checkpoint holds tensors and numbers, use another optimizer"
                    )

    def _numbers(self) -> Iterator[Owned]:
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, int | float) and key != "lr":
                    yield _number(f"{_GROUPS}.{index}", key, value)

    def load_pieces(self, folder: Path) -> None:
        """Copy the weights into place and hand the optimizer its state."""
        weights = PieceReader(folder, "model")
        if set(weights.names()) != set(self.parameters):
            differing = sorted(set(weights.names()) ^ set(self.parameters))
            raise CheckpointError(f"{folder} holds other parameters: {', '.join(differing[:3])}")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights.tensor(name, parameter.shape))
        self._load_optimizer(PieceReader(folder, "optimizer"))

    def _load_optimizer(self, reader: PieceReader) -> None:
        """Rebuild the optimizer's own state dict, so that it places and casts as it wants."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        loaded = self.optimizer.state_dict()
        index_of: dict[str, int] = {}
        for group, numbered in zip(
            self.optimizer.param_groups, loaded["param_groups"], strict=True
        ):
            for parameter, index in zip(group["params"], numbered["params"], strict=True):
                index_of[names[id(parameter)]] = index
        loaded["state"] = {}
        for key in reader.names():
            name, slot = key.rsplit(".", 1)
            if name.startswith(f"{_GROUPS}."):
                target = loaded["param_groups"][int(name.removeprefix(f"{_GROUPS}."))]
                shape = torch.Size()
            else:
                target = loaded["state"].setdefault(index_of[name], {})
                shape = self.parameters[name].shape
            value = reader.tensor(key, shape)
            target[slot.removesuffix(_NUMBER)] = value.item() if slot.endswith(_NUMBER) else value
        self.optimizer.load_state_dict(loaded)

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


def _number(name: str, slot: str, value: float) -> Owned:
    dtype = {bool: torch.bool, int: torch.int64}.get(type(value), torch.float64)
    tensor = torch.tensor(value, dtype=dtype)
    return Owned(name=name, slot=f"{slot}{_NUMBER}", tensor=tensor, split=False)
