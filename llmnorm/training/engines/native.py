"""What the engines on torch's own optimizers share: one copy a rank (plain), or shards (fsdp2).

A parameter, its gradient and its moments are either plain tensors, the same on every rank, or
`DTensor`s of which every rank holds some rows. Everything here serves both; how the objective is
wrapped, and when gradients travel, is the engine's.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from llmnorm.errors import ConfigError
from llmnorm.training.constraints import Constraints
from llmnorm.training.engines import MakeOptimizer, MicroBatch, StepResult
from llmnorm.training.objective import Objective
from llmnorm.training.optimizer import naming_a_failure
from llmnorm.training.pieces import GROUPS, Owned, Piece, PieceReader, share
from llmnorm.training.precision import Precision
from llmnorm.training.ranks import Ranks

logger = logging.getLogger(__name__)

NUMBER = ":number"
"""Ending of a slot that is a Python number, saved as a 0-d tensor."""


class NativeEngine(ABC):
    """Accumulates, clips, steps, saves and loads; subclasses wrap and finish.

    Args:
        ranks: the processes of the run.
    """

    name: str

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.wrapped: Any = None

    @abstractmethod
    def wrap(self, objective: Objective) -> Any:
        """Place the objective and make its gradients those of all ranks."""

    @abstractmethod
    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of a backward pass; `last`: of the last micro-batch of a step."""

    @abstractmethod
    def finish(self, folder: Path | None) -> None:
        """As in `Engine`."""

    def prepare(
        self, objective: Objective, make_optimizer: MakeOptimizer, precision: Precision
    ) -> None:
        """Wrap the model, then make the optimizer for the parameters that it has now."""
        self.model = objective.model
        self.precision = precision
        self.wrapped = self.wrap(objective)
        if self.ranks.world > 1:
            logger.info("%d processes, %s", self.ranks.world, type(self.wrapped).__name__)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer: Any = make_optimizer(self.model)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.constraints = Constraints(self.model, self.ranks.mean)

    def backward(self, micro_batches: list[MicroBatch], count: float) -> Tensor:
        """Accumulate over the micro-batches.

        Gradients are averaged over ranks, so the loss is multiplied by their number first.
        """
        device = self.ranks.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, batch in enumerate(micro_batches, start=1):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            self.constraints.before(batch["targets"], first=number == 1)
            with self.exchanging(number == len(micro_batches)):
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
        norm = whole(torch.nn.utils.get_total_norm(gradients))
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
        """Step the optimizer; what it cannot do, or no checkpoint can hold, shows at the first."""
        first = not self.optimizer.state
        with naming_a_failure(self.optimizer) if first else nullcontext():
            self.optimizer.step()
        if first:
            list(slots(self.optimizer, self.parameters))

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's shards, and an even share of what every rank holds."""
        weights = [
            Owned(name=name, slot="", tensor=p, split=True) for name, p in self.parameters.items()
        ]
        yield from self._own(weights)
        yield from self._own(
            [*slots(self.optimizer, self.parameters), *group_numbers(self.optimizer)]
        )

    def _own(self, tensors: Iterable[Owned]) -> Iterator[Piece]:
        replicated = []
        for owned in tensors:
            if not isinstance(owned.tensor, DTensor):
                replicated.append(owned)
                continue
            start, local = shard(owned.tensor)
            if local.numel():
                complete = local.numel() == owned.tensor.numel()
                part = local.detach() if complete else local.detach().flatten()
                yield Piece(
                    name=owned.name, slot=owned.slot, start=start, tensor=part, whole=complete
                )
        yield from share(replicated, self.ranks.rank, self.ranks.world)

    def load_pieces(self, folder: Path) -> None:
        """Copy the weights into place and hand the optimizer its state."""
        weights = PieceReader(folder, "model")
        optimizer = PieceReader(folder, "optimizer")
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        weights.check(shapes)
        optimizer.check(shapes)
        for name, parameter in self.parameters.items():
            start, local = shard(parameter)
            values = weights.flat(name, start, start + local.numel())
            local.data.copy_(values.reshape(local.shape))
        self._load_optimizer(optimizer)

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
            if name.startswith(f"{GROUPS}."):
                target = loaded["param_groups"][int(name.removeprefix(f"{GROUPS}."))]
            else:
                target = loaded["state"].setdefault(index_of[name], {})
            parameter = self.parameters.get(name)
            if parameter is not None and reader.whole_shape(key) in (None, parameter.shape):
                value = _like(parameter, reader, key)
            else:
                value = reader.tensor(key, torch.Size())
            target[slot.removesuffix(NUMBER)] = value.item() if slot.endswith(NUMBER) else value
        self.optimizer.load_state_dict(loaded)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what all ranks hold of it (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor) -> tuple[int, Tensor]:
    """Return what this rank holds: the flat index of its first element, and the values.

    A shard is some rows, dealt as `torch.chunk` does: equal counts, the last ranks have fewer.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    first = min(-(-rows // mesh.size()) * mesh.get_local_rank(), rows)
    return first * (tensor.numel() // max(rows, 1)), tensor.to_local()


def _like(parameter: Tensor, reader: PieceReader, key: str) -> Tensor:
    """Return a tensor of the shape and sharding of `parameter` with the checkpoint's values."""
    start, local = shard(parameter)
    values = reader.flat(key, start, start + local.numel()).reshape(local.shape)
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        values.to(local.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def slots(optimizer: Any, parameters: Mapping[str, Tensor]) -> Iterator[Owned]:
    """Yield what an optimizer keeps of each parameter.

    Raises:
        ConfigError: for a state that no checkpoint can hold.
    """
    name_of = type(optimizer).__name__
    for name, parameter in parameters.items():
        for slot, value in sorted(optimizer.state.get(parameter, {}).items()):  # resumes reorder
            if isinstance(value, Tensor):
                like = value.shape == parameter.shape and value.ndim > 0
                if isinstance(value, DTensor) and not like:
                    raise ConfigError(
                        f"{name_of} keeps a sharded state {slot!r} of another shape than {name}; "
                        "use another optimizer, or ddp.yaml"
                    )
                yield Owned(name=name, slot=slot, tensor=value, split=like)
            elif isinstance(value, int | float):
                yield number(name, slot, value)
            elif value is not None:
                raise ConfigError(
                    f"{name_of} keeps a {type(value).__name__} in state {slot!r}; a checkpoint "
                    "holds tensors and numbers, use another optimizer"
                )


def number(name: str, slot: str, value: float) -> Owned:
    """Return a Python number as a 0-d tensor that one rank writes."""
    dtype = {bool: torch.bool, int: torch.int64}.get(type(value), torch.float64)
    tensor = torch.tensor(value, dtype=dtype)
    return Owned(name=name, slot=f"{slot}{NUMBER}", tensor=tensor, split=False)


def group_numbers(optimizer: Any) -> Iterator[Owned]:
    """Yield the numbers of an optimizer's groups; learning rates are the schedule's."""
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key in ("lr", "params"):
                continue
            if isinstance(value, int | float):
                yield number(f"{GROUPS}.{index}", key, value)
            elif isinstance(value, Tensor):
                yield Owned(name=f"{GROUPS}.{index}", slot=key, tensor=value, split=False)


@torch.no_grad()
def write_model(
    model: Any,
    folder: Path,
    ranks: Ranks,
    parameters: Mapping[str, Tensor],
    gather: Callable[[Tensor], Tensor],
) -> None:
    """Gather one parameter after the other into rank 0's memory; write a Hugging Face folder.

    Args:
        model: whose config and code go into the folder.
        folder: to write, by rank 0.
        ranks: the processes of the run.
        parameters: by name, the same on every rank.
        gather: returns the whole of one; a collective.
    """
    gathered: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        complete = gather(parameter)
        if ranks.is_main:
            gathered[name] = complete.cpu()
        del complete
    if ranks.is_main:
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict=gathered)
