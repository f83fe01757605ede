"""Where DeepSpeed keeps what: flat float32 tensors, and which part of which parameter lies in them.

ZeRO-1 and 2 lay a group's parameters end to end and give each rank an equal range of that, so a
parameter is whole on one rank or cut at borders; ZeRO-3 gives each rank an equal range of every
parameter. Ends are padded. All of that becomes one table here, which saving, loading and Muon read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter's elements in a flat tensor of this rank, padding left out.

    Args:
        name: the parameter's name in the state dict.
        shape: the whole parameter's.
        start: index of the first element held here in the flattened parameter.
        numel: how many are held here; 0 for none.
        offset: where they begin in the flat tensor.
    """

    name: str
    shape: torch.Size
    start: int
    numel: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the elements in a tensor that is laid out like the shard's."""
        return flat.narrow(0, self.offset, self.numel)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A flat tensor that the optimizer steps.

    Args:
        flat: the float32 weights.
        group: index of the optimizer's parameter group; -1 for a parameter that is not trained.
        parts: one for each parameter of the group, the same ones on every rank.
    """

    flat: Tensor
    group: int
    parts: tuple[Part, ...]


def find_shards(zero: Any, names: Mapping[int, str]) -> list[Shard]:
    """Return this rank's shards.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
        names: of the parameters, by `id`.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats, groups, parts = zero.fp32_partitioned_groups_flat, zero.fp16_groups, _ranges
        numbers = [zero.sub_group_to_group_id[i] for i in range(len(groups))]
    else:
        flats, groups, parts = zero.single_partition_of_fp32_groups, zero.bit16_groups, _fragments
        numbers = list(range(len(groups)))
    return [
        Shard(flat=flat, group=number, parts=tuple(parts(parameters, names)))
        for flat, number, parameters in zip(flats, numbers, groups, strict=True)
    ]


def find_frozen(name: str, parameter: Any) -> Shard:
    """Return what this rank holds of a parameter that no optimizer steps."""
    names = {id(parameter): name}
    if hasattr(parameter, "ds_tensor"):
        return Shard(flat=parameter.ds_tensor, group=-1, parts=tuple(_ranges([parameter], names)))
    shape = parameter.shape
    part = Part(name=name, shape=shape, start=0, numel=shape.numel(), offset=0)
    return Shard(flat=parameter.detach().view(-1), group=-1, parts=(part,))


def _fragments(parameters: list[Any], names: Mapping[int, str]) -> Iterator[Part]:
    """Stages 1 and 2."""
    for parameter in parameters:
        start = numel = offset = 0
        if (mapping := parameter._hp_mapping) is not None:
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
        name, shape = names[id(parameter)], parameter.shape
        yield Part(name=name, shape=shape, start=start, numel=numel, offset=offset)


def _ranges(parameters: list[Any], names: Mapping[int, str]) -> Iterator[Part]:
    """Stage 3."""
    rank, offset = dist.get_rank(), 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = min(rank * share, parameter.ds_numel)
        yield Part(
            name=names[id(parameter)],
            shape=torch.Size(parameter.ds_shape),
            start=start,
            numel=min(share, parameter.ds_numel - start),
            offset=offset,
        )
        offset += share
