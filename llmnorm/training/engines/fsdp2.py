"""PyTorch's fully sharded data parallelism: weights, gradients and moments live in shards.

accelerate 1.15 knows FSDP on accelerators alone, so `fully_shard` is applied here, the same on GPUs
and CPUs: each block is a unit, what is left (embedding, final norm, head) is another. Parameters
stay float32 and forwards run in autocast, as on the other engines.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from llmnorm.errors import EnvironmentProblem
from llmnorm.processes import leave_process_group
from llmnorm.training.engines import asked
from llmnorm.training.engines.native import NativeEngine, whole, write_model
from llmnorm.training.engines.plain import PATIENCE, check_world
from llmnorm.training.objective import Objective
from llmnorm.training.ranks import Ranks

_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": "offload of parameters is not supported: set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "recomputation is the run file's: set "
    "training.activation_checkpointing, and fsdp_activation_checkpointing: false",
}


class FSDP2Engine(NativeEngine):
    """Every rank holds some rows of every parameter; blocks are gathered when they run.

    Args:
        cpu: run on the CPU.

    Raises:
        EnvironmentProblem: if the processes are not those that the launcher started, or its FSDP
            settings ask for what this engine does not do.
    """

    name = "fsdp2"

    def __init__(self, *, cpu: bool) -> None:
        self._reshard = read_settings(os.environ)
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        super().__init__(Ranks(state.process_index, state.num_processes, state.device))
        check_world(self.ranks.world)
        if not dist.is_initialized():  # one process: a group of its own
            backend = "gloo" if cpu else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def wrap(self, objective: Objective) -> Any:
        """Shard each block, then the rest.

        Raises:
            EnvironmentProblem: if a parameter was left whole.
        """
        world, device = self.ranks.world, self.ranks.device
        shard_blocks(objective, init_device_mesh(device.type, (world,)), reshard=self._reshard)
        objective.to(device)
        left = [name for name, p in objective.named_parameters() if not isinstance(p, DTensor)]
        if left or not isinstance(objective, FSDPModule):
            raise EnvironmentProblem(
                f"FSDP2 left {', '.join(left[:3]) or 'the objective'} unsharded on {world} "
                "processes; expected every parameter in shards: report this"
            )
        return objective

    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        """Gradients travel with every micro-batch, so that only shards of them are kept."""
        return nullcontext()

    def finish(self, folder: Path | None) -> None:
        """Gather one tensor after the other into rank 0's memory, write, leave the group."""
        if folder is not None:
            write_model(self.model, folder, self.ranks, self.parameters, whole)
        self.wrapped = None
        leave_process_group()


def shard_blocks(objective: Objective, mesh: DeviceMesh, *, reshard: bool) -> None:
    """Shard each block, then the rest, in place; `reshard`: blocks again after forward."""
    trunk: Any = objective.model.base_model
    for layer in trunk.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(objective, mesh=mesh)
    _open_for_direct_calls(objective)


def read_settings(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher wants blocks sharded again between forward and backward.

    Raises:
        EnvironmentProblem: for FSDP1, and settings that belong to the run file.
    """
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise EnvironmentProblem(
            f"the launcher asks for FSDP version {version}; this is FSDP2: set fsdp_version: 2, "
            "or use configs/accelerate/fsdp2.yaml"
        )
    for variable, remedy in _SETTINGS.items():
        if asked(variable, environment):
            raise EnvironmentProblem(f"the launcher sets {variable}; {remedy}")
    return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"


def _open_for_direct_calls(objective: Any) -> None:
    """Let validation call the language model itself, which is not the root of the shards.

    Blocks gather their own parameters; the root's are gathered before such a call, and let go
    after it. A run that continues may validate before its first step: the first module that runs
    would become the root.
    """

    def gather(*_: object) -> None:
        objective._get_fsdp_state()._lazy_init()
        objective.unshard()

    def let_go(*_: object) -> None:
        objective.reshard()

    objective.model.register_forward_pre_hook(gather)
    objective.model.register_forward_hook(let_go, always_call=True)
