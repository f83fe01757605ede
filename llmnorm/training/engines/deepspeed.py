"""DeepSpeed's ZeRO, stages 1 to 3: moments, gradients and weights live in shards.

`deepspeed.initialize` is called directly: accelerate's way around it falls back to other engines
without a word (on the CPU, or with `use_cpu`). Which settings are taken is `deepspeed_config.py`,
where tensors lie `deepspeed_shards.py`, which optimizers fit `deepspeed_optimizer.py`.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmnorm.errors import EnvironmentProblem
from llmnorm.processes import leave_process_group
from llmnorm.training.constraints import Constraints, Mean
from llmnorm.training.engines import MakeOptimizer, MicroBatch, StepResult
from llmnorm.training.engines.deepspeed_config import (
    Promises,
    Settings,
    fill_settings,
    read_settings,
)
from llmnorm.training.engines.deepspeed_optimizer import ShardedMuon, for_shards
from llmnorm.training.engines.deepspeed_shards import Part, Shard, find_frozen, find_shards
from llmnorm.training.engines.native import NUMBER, group_numbers, number, write_model
from llmnorm.training.engines.plain import PATIENCE, check_world
from llmnorm.training.objective import IGNORED, Objective
from llmnorm.training.pieces import GROUPS, Piece, PieceReader, share
from llmnorm.training.precision import Precision
from llmnorm.training.ranks import Ranks

logger = logging.getLogger(__name__)


class DeepSpeedEngine:
    """Steps shards; DeepSpeed averages gradients, clips them, and gathers weights.

    Args:
        cpu: run on the CPU, over gloo.

    Raises:
        ConfigError: for DeepSpeed settings that contradict the run file or are not supported.
        EnvironmentProblem: if DeepSpeed is not installed, or the processes are not those that the
            launcher started.
    """

    def __init__(self, *, cpu: bool) -> None:
        self.launched = read_settings(os.environ)
        settings, self.promises = self.launched
        self.stage: int = settings["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        self.deepspeed = _import(cpu=cpu)
        self.ranks = _open_group(cpu=cpu)
        check_world(self.ranks.world)
        self.deepspeed.init_distributed()  # takes over torch's group
        self.wrapped: Any = None

    def prepare(
        self, objective: Objective, make_optimizer: MakeOptimizer, precision: Precision
    ) -> None:
        """Shard the model and the optimizer made for it.

        Raises:
            ConfigError: as `fit`.
            EnvironmentProblem: as `fit`, or if DeepSpeed did not do what it was asked for.
        """
        self.model = objective.model
        self.rules, optimizer, settings = fit(
            self.model, make_optimizer, self.launched, precision, self.ranks
        )
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        if self.stage == 3 and "bf16" not in settings:
            # one parameter after the other, so that no device ever holds the whole model
            self.deepspeed.zero.Init(module=objective, config_dict_or_path=settings)
        self.wrapped = self.deepspeed.initialize(
            model=objective, optimizer=optimizer, config=settings
        )[0]
        self.zero = self.wrapped.optimizer
        self._check()
        self.shards = find_shards(self.zero, names)
        self._names = names
        self.optimizer: Any = self.zero.optimizer
        if isinstance(self.optimizer, ShardedMuon):
            self.optimizer.attach(self.shards)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        logger.info(
            "%d processes, %s, ZeRO-%d", self.ranks.world, type(self.wrapped).__name__, self.stage
        )

    def _check(self) -> None:
        """Compare what runs with what was asked for."""
        zero = type(self.zero).__name__
        expected = "DeepSpeedZeroOptimizer" + ("_Stage3" if self.stage == 3 else "")
        stage, world = self.wrapped.zero_optimization_stage(), self.wrapped.dp_world_size
        if (zero, stage, world) != (expected, self.stage, self.ranks.world):
            raise EnvironmentProblem(
                f"DeepSpeed runs {zero} at stage {stage} on {world} processes; expected {expected} "
                f"at stage {self.stage} on {self.ranks.world}: simplify its settings"
            )

    def backward(self, micro_batches: list[MicroBatch], count: float) -> Tensor:
        """Accumulate over the micro-batches; shards of gradients travel as the stage wants.

        DeepSpeed averages over ranks, so the loss is multiplied by their number first.
        """
        device, world = self.ranks.device, self.ranks.world
        self._check_batch(micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for position, batch in enumerate(micro_batches, start=1):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            self.wrapped.set_gradient_accumulation_boundary(position == len(micro_batches))
            for rules, _ in self.rules:
                rules.before(batch["targets"], first=position == 1)
            loss_sum, _ = self.wrapped(**batch)
            self.wrapped.backward(loss_sum * (world / max(count, 1.0)), scale_wrt_gas=False)
            total += loss_sum.detach()
        return total

    def _check_batch(self, micro_batches: list[MicroBatch]) -> None:
        """Compare the batch with what a user's own file says of it."""
        seen: dict[str, float] = {
            "train_micro_batch_size_per_gpu": len(micro_batches[0]["targets"]),
            "gradient_accumulation_steps": len(micro_batches),
        }
        if "train_batch_size" in self.promises.values:  # rows that are not padding
            rows = sum(int((b["targets"] != IGNORED).any(-1).sum()) for b in micro_batches)
            (seen["train_batch_size"],) = self.ranks.sums(rows)
        self.promises.check(seen)

    def clip_and_step(
        self, loss_sum: Tensor, count: float, *, factor: float, max_norm: float, step: int
    ) -> StepResult:
        """Agree on the loss, then let DeepSpeed clip and step, or leave all untouched.

        DeepSpeed skips a step whose gradient norm is not finite; so one whose loss is not gets a
        gradient that is not.
        """
        self.promises.check({"gradient_clipping": max_norm})
        (total,) = self.ranks.sums(loss_sum.item())
        loss = total / count if count else math.nan
        if not math.isfinite(loss) and self.ranks.is_main:
            first = next(iter(self.zero.averaged_gradients.values()))[0]
            first[(0,) * first.ndim] = math.nan
        self.zero.clip_grad = max_norm
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.wrapped.step()
        applied = self.wrapped.was_step_applied()
        if applied and self.rules:
            self._keep_rules(step)
        norm = float(self.wrapped.get_global_grad_norm())
        return StepResult(loss=loss, grad_norm=norm, applied=applied)

    @torch.no_grad()
    def _keep_rules(self, step: int) -> None:
        """Apply the model's rules to whole weights, of which the shards then take their parts."""
        changed: dict[str, Tensor] = {}
        for rule, parameters in self.rules:
            with self._whole(parameters), rule.around(step):
                pass
            changed |= {self._names[id(p)]: getattr(p, "ds_tensor", p) for p in parameters}
        for shard in self.shards:
            for part in shard.parts:
                if part.name in changed:
                    start = 0 if self.stage == 3 else part.start
                    values = changed[part.name].flatten()[start : start + part.numel]
                    part.of(shard.flat).copy_(values)

    def _whole(self, parameters: list[Any]) -> AbstractContextManager[object]:
        """Return the context in which parameters may be read and changed, equally on all ranks."""
        if self.stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[object] = self.deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0
        )
        return gathered

    def pieces(self) -> Iterator[Piece]:
        """Yield the ranges of weights and moments that this rank owns, padding left out."""
        frozen = self._frozen() if self.stage == 3 or self.ranks.is_main else []
        for shard in [*self.shards, *frozen]:
            for part in shard.parts:
                yield from _piece(part, "", shard.flat)
        for shard in self.shards:
            for slot, value in self.optimizer.state.get(shard.flat, {}).items():
                for part in shard.parts:
                    yield from self._slot(shard, part, slot, value)
        yield from share(group_numbers(self.optimizer), self.ranks.rank, self.ranks.world)

    def _frozen(self) -> list[Shard]:
        """Return the parameters that no optimizer steps: in ranges at stage 3, else whole."""
        return [
            find_frozen(name, parameter)
            for name, parameter in self.parameters.items()
            if not parameter.requires_grad
        ]

    def _slot(self, shard: Shard, part: Part, slot: str, value: Any) -> Iterator[Piece]:
        """Yield a part of what the optimizer keeps; the rank of the first element has numbers."""
        if isinstance(value, Tensor) and value.shape == shard.flat.shape:
            yield from _piece(part, slot, value)
        elif part.start or not part.numel:
            return
        elif isinstance(value, Tensor) and value.numel() == 1:
            yield Piece(name=part.name, slot=slot, start=0, tensor=value.detach(), whole=True)
        elif isinstance(value, int | float):
            owned = number(part.name, slot, value)
            yield Piece(name=owned.name, slot=owned.slot, start=0, tensor=owned.tensor, whole=True)
        else:
            assert value is None, f"{slot} is a {type(value).__name__}, which `for_shards` refuses"

    def load_pieces(self, folder: Path) -> None:
        """Fill this rank's shards from the ranges it needs, then the copies that forwards use."""
        weights, optimizer = PieceReader(folder, "model"), PieceReader(folder, "optimizer")
        held = [*self.shards, *self._frozen()]
        shapes = {part.name: part.shape for shard in held for part in shard.parts}
        weights.check(shapes)
        optimizer.check(shapes)
        with torch.no_grad():
            for shard in held:
                for part in shard.parts:
                    part.of(shard.flat).copy_(
                        weights.flat(part.name, part.start, part.start + part.numel)
                    )
            self._load_optimizer(optimizer)
        self._refresh()

    def _load_optimizer(self, reader: PieceReader) -> None:
        """Make the state as the optimizer itself would have, and fill it."""
        slots: dict[str, list[str]] = {}
        for key in reader.names():
            name, slot = key.rsplit(".", 1)
            slots.setdefault(name, []).append(slot)
        for index, group in enumerate(self.optimizer.param_groups):
            for slot in slots.get(f"{GROUPS}.{index}", []):
                value = reader.tensor(f"{GROUPS}.{index}.{slot}", torch.Size())
                is_number = slot.endswith(NUMBER)
                group[slot.removesuffix(NUMBER)] = value.item() if is_number else value
        for shard in self.shards:
            group = self.optimizer.param_groups[shard.group]
            on_device = group.get("fused") or group.get("capturable")
            state = self.optimizer.state[shard.flat]
            largest = max(shard.parts, key=lambda part: part.shape.numel())
            for slot in slots.get(largest.name, []):
                key = f"{largest.name}.{slot}"
                stored = reader.whole_shape(key)
                if stored is not None and stored.numel() == 1 and stored != largest.shape:
                    value = reader.tensor(key, torch.Size())
                    place = shard.flat.device if on_device else value.device
                    number_ = slot.endswith(NUMBER)
                    state[slot.removesuffix(NUMBER)] = value.item() if number_ else value.to(place)
                    continue
                state[slot] = torch.zeros_like(shard.flat)
                for part in shard.parts:
                    part.of(state[slot]).copy_(
                        reader.flat(f"{part.name}.{slot}", part.start, part.start + part.numel)
                    )

    def _refresh(self) -> None:
        """Make the weights that forwards use those of the shards."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.parameter_offload.partition_all_parameters()
        for index in range(len(self.shards)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)

    def finish(self, folder: Path | None) -> None:
        """Gather one tensor after the other into rank 0's memory, write, leave the group."""
        if folder is not None:
            write_model(self.model, folder, self.ranks, self.parameters, self._complete)
        if self.wrapped is not None:
            self.wrapped.destroy()
            self.wrapped = self.zero = None
        leave_process_group()

    def _complete(self, parameter: Any) -> Tensor:
        """Return a copy of the float32 weights of one parameter, whole on every rank."""
        if parameter.requires_grad:
            complete: Tensor = self.deepspeed.utils.safe_get_full_fp32_param(parameter)
            return complete.detach().clone()
        with self._whole([parameter]):
            return parameter.detach().float().clone()


def _import(*, cpu: bool) -> Any:
    """Import DeepSpeed; on the CPU without the extension that it would compile for minutes."""
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise EnvironmentProblem(
            f"the launcher asked for DeepSpeed, which cannot be imported ({error}); "
            "pip install 'llmnorm[deepspeed]', or use another file of configs/accelerate/"
        ) from error
    if cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a skipped step is the loop's to tell
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # torch 2.13 renames them
        warnings.filterwarnings("ignore", f".*{name}. is deprecated", FutureWarning)
    return deepspeed


def _open_group(*, cpu: bool) -> Ranks:
    """Open torch's process group, which DeepSpeed then takes over."""
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cpu") if cpu else torch.device("cuda", local)
    if not cpu:
        torch.cuda.set_device(device)
    backend = "gloo" if cpu else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:  # one process without a launcher
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def fit(
    model: Any,
    make_optimizer: MakeOptimizer,
    launched: tuple[Settings, Promises],
    precision: Precision,
    ranks: Ranks,
) -> tuple[list[tuple[Constraints, list[Any]]], torch.optim.Optimizer, Settings]:
    """Return what the engine makes of a run: the model's rules, the optimizer, complete settings.

    Nothing is sharded yet; the model may be on the meta device.

    Raises:
        ConfigError: if shards cannot have this optimizer, or the precision is not the run file's.
        EnvironmentProblem: if the model has a rule for whole gradients.
    """
    rules = list(model_rules(model, ranks.mean))
    optimizer = for_shards(make_optimizer(model))
    given, promises = launched
    settings = fill_settings(
        given, promises.source, precision, ranks.world, model.config.hidden_size
    )
    return rules, optimizer, settings


def model_rules(model: Any, mean: Mean) -> Iterator[tuple[Constraints, list[Any]]]:
    """Yield the model's rules, one for each matrix so that one is whole at a time.

    Raises:
        EnvironmentProblem: if a rule needs whole gradients.
    """
    rules = Constraints(model, mean)
    if rules.spec.kind == "lawn":
        raise EnvironmentProblem(
            "weights 'lawn' turns whole gradients before each step, which ZeRO cuts into flat "
            "ranges; use configs/accelerate/ddp.yaml or fsdp2.yaml"
        )
    moving, matrices = rules.moving, rules.matrices
    for matrix in matrices if rules.spec.kind in ("unit", "project") else []:
        rule = copy(rules)
        rule.matrices, rule.moving = [matrix], []
        yield rule, [matrix.weight]
    if moving:
        rules.matrices = []
        yield rules, [p for module in moving for p in module.parameters()]


def _piece(part: Part, slot: str, flat: Tensor) -> Iterator[Piece]:
    if part.numel:
        values, whole = part.of(flat).detach(), part.numel == part.shape.numel()
        if whole:
            values = values.reshape(part.shape)
        yield Piece(name=part.name, slot=slot, start=part.start, tensor=values, whole=whole)
