"""What must hold after every optimizer step, beside what the optimizer does: one hook around it.

The rules of the config field `weights` (`modeling/weights.py` says what each is for), and modules
that move by the number of steps, such as TaperNorm's gate (`Moving`). Engines announce each
micro-batch (`before`) and write `with constraints.around(step): optimizer.step()`, which a skipped
step never gets to. Nothing keeps a state from step to step, so a continued run is the run; under
DDP every rank does the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from llmnorm.modeling.initialization import expected_std
from llmnorm.modeling.weights import WeightSpec, unit_dim
from llmnorm.training.objective import IGNORED

Mean = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight under a rule; `length` is the Frobenius norm that its init is expected to have."""

    weight: Tensor
    unit_dim: int
    length: float
    in_block: bool


class Moving(Protocol):
    """A module that moves by the step: one that has `after_step`."""

    def before(self, rows: Tensor, *, first: bool) -> None:
        """Meet a micro-batch, the `first` of a step or not; `rows` (batch,) says which count."""

    def measured(self, step: int) -> Tensor | None:
        """What to average over the ranks after this step, (n,); None for nothing."""

    def after_step(self, step: int, means: Tensor | None) -> None:
        """Move, given the average of what was measured."""


@contextmanager
def _unit(matrices: list[Matrix], spec: WeightSpec, step: int) -> Iterator[None]:
    """Every row has length 1 after every step."""
    yield
    for matrix in matrices:
        matrix.weight.copy_(normalize(matrix.weight, dim=matrix.unit_dim))


@contextmanager
def _project(matrices: list[Matrix], spec: WeightSpec, step: int) -> Iterator[None]:
    """Every `interval_steps` steps each matrix is as long as its init is expected to be."""
    yield
    if step % spec.interval_steps == 0:
        for matrix in matrices:
            if matrix.in_block:
                matrix.weight.mul_(matrix.length / matrix.weight.norm())


@contextmanager
def _lawn(matrices: list[Matrix], spec: WeightSpec, step: int) -> Iterator[None]:
    """After `free_steps` steps each matrix turns but keeps its length, as measured before the step.

    The gradient loses its part along the matrix, so that the optimizer's averages do too.
    """
    frozen = [m.weight for m in matrices if m.in_block] if step > spec.free_steps else []
    lengths = [weight.norm() for weight in frozen]
    for weight, length in zip(frozen, lengths, strict=True):
        assert weight.grad is not None
        along = (weight.grad * weight).sum() / length.square()
        weight.grad.sub_(along * weight)
    yield
    for weight, length in zip(frozen, lengths, strict=True):
        weight.mul_(length / weight.norm())


_RULES: dict[str, Callable[[list[Matrix], WeightSpec, int], AbstractContextManager[None]]] = {
    "plain": lambda *_: nullcontext(),
    "weight_norm": lambda *_: nullcontext(),  # holds by how the matrix is made
    "unit": _unit,
    "project": _project,
    "lawn": _lawn,
}


class Constraints:
    """The rules of one model.

    Args:
        model: the language model, with the parameters that the optimizer steps.
        mean: averages a tensor over the ranks; identity in one process.
    """

    def __init__(self, model: PreTrainedModel, mean: Mean = lambda value: value) -> None:
        self.spec = WeightSpec.parse(model.config.weights)
        self.matrices = list(_matrices(model))
        self.moving: list[Any] = [m for m in model.modules() if hasattr(m, "after_step")]
        self.mean = mean

    def before(self, targets: Tensor, *, first: bool) -> None:
        """Announce a micro-batch to the modules that move by the step.

        Args:
            targets: (batch, seq); a row without any target is padding.
            first: whether it begins a step; what was seen of a step that was not applied is gone.
        """
        rows = (targets != IGNORED).any(-1) if self.moving else targets
        for module in self.moving:
            module.before(rows, first=first)

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Enclose the optimizer's step.

        Args:
            step: number of this step among those applied, from 1.

        Raises:
            ValueError: if a module measured nothing in a step where it must.
        """
        with torch.no_grad(), _RULES[self.spec.kind](self.matrices, self.spec, step):
            yield
        measured = [module.measured(step) for module in self.moving]
        for module, means in zip(self.moving, self._averaged(measured), strict=True):
            module.after_step(step, means)

    def _averaged(self, measured: list[Tensor | None]) -> list[Tensor | None]:
        """Average over the ranks what was measured, all modules in one collective."""
        values = [value for value in measured if value is not None]
        if not values:
            return measured
        means = iter(self.mean(torch.cat(values)).split([len(value) for value in values]))
        return [None if value is None else next(means) for value in measured]


def _matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """The trainable matrices of linear layers and embeddings, one that is tied once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            weight = module.weight
            std = expected_std(name, module, model.config)
            if weight.requires_grad:
                yield Matrix(
                    weight=weight,
                    unit_dim=unit_dim(name),
                    length=std * weight.numel() ** 0.5,
                    in_block=".layers." in name,
                )
