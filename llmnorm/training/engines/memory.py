"""What each engine makes of a step's memory: which of it a rank holds, and what it adds.

Sizes come from a traced step (`planning/trace.py`). DDP and ZeRO are rules on them, from what their
code allocates; FSDP2 is traced itself. Bytes, of the rank that holds most where shares differ.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmnorm.training.objective import Objective

Wrap = Callable[[Objective], object]

_FLOAT = 4  # bytes

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Held:
    """A parameter and what belongs to it on a rank, in bytes.

    Args:
        weight: the parameter.
        gradient: its gradient (0: frozen).
        slots: the optimizer's tensors of the parameter's shape.
        others: the optimizer's other tensors.
    """

    weight: int
    gradient: int
    slots: int
    others: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """The memory of one step of a rank, in bytes.

    Args:
        parameters: all parameters, each once.
        backward: the most beside weights and optimizer in forward and backward.
        activations: the same without gradients that are complete.
        stepping: temporaries of clipping and of the optimizer's step.
        scoring: the most beside weights and optimizer in a forward of validation.
        accumulation: micro-batches of a step.
    """

    parameters: tuple[Held, ...]
    backward: int
    activations: int
    stepping: int
    scoring: int
    accumulation: int

    def sum(self, what: str) -> int:
        """Return the sum of a field of `Held` over the parameters."""
        return sum(getattr(held, what) for held in self.parameters)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a rank holds, in bytes.

    Args:
        weights: the parameters or this rank's shards of them, with master copies.
        gradients: what is kept of gradients until the step.
        moments: the optimizer's state.
        buffers: what the engine adds for communication and gathered weights.
        activations: of one micro-batch, gradients under way among them.
        peak: the most at once in training and validation: less than the sum where gradients come
            as activations go.
    """

    weights: int
    gradients: int
    moments: int
    buffers: int
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step runs.

    Args:
        world: number of ranks.
        device_type: cpu or cuda.
        zero: DeepSpeed's complete settings `zero_optimization`, for its engines; of what they do
            not name, DeepSpeed's own defaults hold.
    """

    world: int
    device_type: str
    zero: Mapping[str, Any]


def footprint(engine: str, trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    """Return what a rank holds under `engine`, one of `ENGINES`.

    Args:
        engine: its name.
        trace: traces a step, wrapped as an engine would.
        place: where it runs.
    """
    return _RULES[engine](trace, place)


def _plain(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    """A whole copy."""
    step = trace(None)
    return _sum_up(step, gradients=step.sum("gradient"), training=step.backward)


def _ddp(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    """A whole copy beside buckets of all gradients, which are the gradients once they travel.

    Under accumulation the gradients of earlier micro-batches stand apart from the buckets.
    """
    step = trace(None)
    buckets = step.sum("gradient")
    apart = step.accumulation > 1
    return _sum_up(
        step,
        gradients=buckets,
        always=buckets,
        buffers=buckets if apart else 0,
        training=buckets + (step.backward if apart else step.activations),
    )


def _fsdp2(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    """Shards, traced as they are: gathered blocks count as buffers."""
    from llmnorm.training.engines.fsdp2 import shard_blocks

    whole = trace(None)
    with _pretended_group(place) as mesh:
        step = trace(lambda objective: shard_blocks(objective, mesh, reshard=True))
    gradients = step.sum("gradient")
    buffers = max(0, step.backward - whole.activations)
    summed = _sum_up(step, gradients=gradients, buffers=buffers, training=step.backward)
    return replace(summed, activations=whole.activations)


def _zero1(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    return _zero12(trace, place, gradients_of_ranks=place.world)


def _zero2(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    return _zero12(trace, place, gradients_of_ranks=1)


def _zero12(
    trace: Callable[[Wrap | None], Step], place: Place, *, gradients_of_ranks: int
) -> Footprint:
    """Whole weights beside this rank's share of them as the optimizer's, and of the moments.

    Of the gradients stage 1 keeps all until the step, stage 2 this rank's share, which it holds
    twice at the end of backward; the step takes a flat copy of the share.
    """
    step, world = trace(None), place.world
    weights, share = step.sum("weight"), step.sum("gradient") // world
    moments = step.sum("slots") // world
    gradients = gradients_of_ranks * share
    buffers = _bucket(place) * (2 if place.zero.get("overlap_comm") else 1)
    if gradients_of_ranks > 1:
        backward = step.backward
    else:
        earlier = gradients if step.accumulation > 1 else 0
        backward = max(earlier + step.activations, gradients + share)
    training = max(buffers + backward, gradients + share + step.stepping)
    weights += weights // world
    most = max(training, step.scoring)
    return _footprint(
        step, weights=weights, gradients=gradients, moments=moments, buffers=buffers, most=most
    )


def _zero3(trace: Callable[[Wrap | None], Step], place: Place) -> Footprint:
    """This rank's shares, weights twice; weights that will be used again soon stay gathered."""
    step, world = trace(None), place.world
    weights, moments = 2 * (step.sum("weight") // world), step.sum("slots") // world
    gradients = step.sum("gradient") // world
    gathered = min(step.sum("weight"), _FLOAT * place.zero.get("stage3_max_live_parameters", 10**9))
    under_way = min(step.sum("weight"), _FLOAT * place.zero["stage3_prefetch_bucket_size"])
    gloo = under_way if place.device_type == "cpu" else 0  # it copies what it gathers
    buffers = _bucket(place) + gathered + gloo
    training = max(step.activations, gradients + step.stepping)
    most = gradients + buffers + max(training, step.scoring)
    return _footprint(
        step, weights=weights, gradients=gradients, moments=moments, buffers=buffers, most=most
    )


def _bucket(place: Place) -> int:
    return _FLOAT * int(place.zero["reduce_bucket_size"])


def _sum_up(
    step: Step, *, gradients: int, training: int, always: int = 0, buffers: int = 0
) -> Footprint:
    weights = step.sum("weight")
    moments = step.sum("slots") + step.sum("others")
    most = max(training, gradients + step.stepping, always + step.scoring)
    return _footprint(
        step, weights=weights, gradients=gradients, moments=moments, buffers=buffers, most=most
    )


def _footprint(
    step: Step, *, weights: int, gradients: int, moments: int, buffers: int, most: int
) -> Footprint:
    """`most`: the most that is held at once beside weights and moments."""
    return Footprint(
        weights=weights,
        gradients=gradients,
        moments=moments,
        buffers=buffers,
        activations=step.activations,
        peak=weights + moments + most,
    )


@contextmanager
def _pretended_group(place: Place) -> Iterator[DeviceMesh]:
    """A process group of which only this rank exists, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=place.world)
    try:
        yield init_device_mesh(place.device_type, (place.world,))
    finally:
        dist.destroy_process_group()


_RULES: dict[str, Callable[[Callable[[Wrap | None], Step], Place], Footprint]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "zero1": _zero1,
    "zero2": _zero2,
    "zero3": _zero3,
}
