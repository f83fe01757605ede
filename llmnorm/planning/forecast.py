"""What a run will need, as numbers: batch, memory by engine, disk, time."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llmnorm.calibration import assumed
from llmnorm.config import RunConfig
from llmnorm.config.start import read_config
from llmnorm.environment import parameter_counts
from llmnorm.errors import LlmNormError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.planning.machine import Machine, free_disk
from llmnorm.planning.trace import Work, trace_step
from llmnorm.resources import engine_file
from llmnorm.training.assembly import Plan
from llmnorm.training.engines.deepspeed import fit
from llmnorm.training.engines.deepspeed_config import FILE, Promises, Settings, read_settings
from llmnorm.training.engines.memory import Place, Step, Wrap, footprint
from llmnorm.training.environment import flops_per_token
from llmnorm.training.objective import LOGITS_PER_CHUNK
from llmnorm.training.optimizer import make_optimizer
from llmnorm.training.precision import Precision, peak_flops
from llmnorm.training.ranks import Ranks

_EFFICIENCY = {"cpu": (0.3, 0.8), "cuda": (0.25, 0.55)}
"""Of the rate of a large matrix product: what training of such models is seen to reach."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the run is started.

    Args:
        engine: one of `training/engines/memory.py`.
        world: number of processes.
        zero: DeepSpeed's settings as `read_settings` returns them, where the launcher has its own.
    """

    engine: str
    world: int
    zero: tuple[Settings, Promises] | None = None

    def engines(self) -> list[str]:
        """Return the engines that can run in this world, the chosen one first."""
        others = ["plain"] if self.world == 1 else ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
        return list(dict.fromkeys([self.engine, *others]))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The run that is looked at."""

    config: RunConfig
    model_config: LlmNormConfig
    plan: Plan
    launch: Launch
    precision: Precision
    machine: Machine


def forecast(subject: Subject) -> dict[str, Any]:
    """Return what the run will need, as JSON; sizes are in bytes.

    Raises:
        LlmNormError: as the engine asked for would refuse the run.
    """
    config, plan, launch = subject.config, subject.plan, subject.launch
    work = _work(config, plan, launch.world)
    _settings(subject, work, launch.engine)
    recomputing = replace(work, activation_checkpointing=not work.activation_checkpointing)
    step, other = _trace(subject, work), _trace(subject, recomputing)
    with torch.device("meta"):
        model = LlmNormForCausalLM(assumed(subject.model_config))
    logits = work.rows * work.seq_len * subject.model_config.vocab_size
    engines = {name: _look(subject, work, step, name) for name in launch.engines()}
    return {
        "parameters": parameter_counts(model),
        "batch": _batch(config, plan, work, launch.world),
        "precision": {"name": subject.precision.name, "reason": subject.precision.reason},
        "engine": launch.engine,
        "world": launch.world,
        "memory": {
            "device": subject.machine.name,
            "room": subject.machine.room(launch.world),
            "engines": engines,
            "activations": {
                "activation_checkpointing": work.activation_checkpointing,
                "as_is": step.activations,
                "otherwise": other.activations,
            },
            "logits_chunk": 4 * min(LOGITS_PER_CHUNK, logits),
            "validation": step.scoring,
            "teacher": _teacher(config),
        },
        "ram": _ram(subject, step),
        "disk": _disk(config, step),
        "time": _time(subject, flops_per_token(model, config.data.seq_len)),
    }


def _work(config: RunConfig, plan: Plan, world: int) -> Work:
    batch = config.training.global_batch_size
    return Work(
        rows=plan.micro_batch_size,
        seq_len=config.data.seq_len,
        document_mask=config.data.document_mask,
        accumulation=-(-batch // (plan.micro_batch_size * world)),
        scored=config.eval.batch_size,
        clip_norm=config.training.clip_norm,
        activation_checkpointing=config.training.activation_checkpointing,
    )


def _batch(config: RunConfig, plan: Plan, work: Work, world: int) -> dict[str, int]:
    computed = work.rows * work.accumulation * world
    return {
        "global_batch_size": config.training.global_batch_size,
        "micro_batch_size": work.rows,
        "accumulation": work.accumulation,
        "padding": computed - config.training.global_batch_size,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
    }


def _trace(subject: Subject, work: Work, wrap: Wrap | None = None) -> Step:
    settings, precision = subject.config.optimizer, subject.precision
    return trace_step(subject.model_config, work, settings, precision, wrap)


def _settings(subject: Subject, work: Work, engine: str) -> dict[str, Any]:
    """Return the `zero_optimization` with which an engine would run, {} for those without.

    Raises:
        LlmNormError: as the engine would, before its first step is over.
    """
    if not engine.startswith("zero"):
        return {}
    config, launch = subject.config, subject.launch
    launched = launch.zero if engine == launch.engine else None
    launched = launched or read_settings({FILE: str(engine_file(engine))})
    with torch.device("meta"):
        model = LlmNormForCausalLM(assumed(subject.model_config))
    settings = fit(
        model,
        lambda model: make_optimizer(model, config.optimizer),
        launched,
        subject.precision,
        Ranks(0, launch.world, torch.device("cpu")),
    )[-1]
    launched[1].check(
        {
            "train_batch_size": config.training.global_batch_size,
            "train_micro_batch_size_per_gpu": work.rows,
            "gradient_accumulation_steps": work.accumulation,
            "gradient_clipping": work.clip_norm,
        }
    )
    zero: dict[str, Any] = settings["zero_optimization"]
    return zero


def _look(subject: Subject, work: Work, step: Step, engine: str) -> dict[str, Any]:
    """Return the engine's footprint, or why one that is not asked for would refuse the run."""
    try:
        return _footprint(subject, work, step, engine)
    except LlmNormError as error:
        if engine == subject.launch.engine:
            raise
        return {"fits": False, "refused": str(error)}


def _footprint(subject: Subject, work: Work, step: Step, engine: str) -> dict[str, Any]:
    """Return the engine's footprint; `step` is the trace without an engine."""
    launch, precision = subject.launch, subject.precision
    zero = _settings(subject, work, engine)
    place = Place(world=launch.world, device_type=precision.device_type, zero=zero)
    found = footprint(
        engine, lambda wrap: step if wrap is None else _trace(subject, work, wrap), place
    )
    room = subject.machine.room(launch.world) - _teacher(subject.config)
    if precision.device_type == "cpu":
        room -= _copied(subject, step)
    return {**asdict(found), "fits": found.peak <= room}


def _ram(subject: Subject, step: Step) -> dict[str, Any]:
    """Every rank builds the whole model in RAM before an engine takes it."""
    here = min(subject.launch.world, max(1, subject.machine.devices))
    if subject.machine.device.type == "cpu":
        here = subject.launch.world
    copied = _copied(subject, step)
    needed = here * (max(step.sum("weight"), copied) + _teacher(subject.config))
    return {
        "building": step.sum("weight"),
        "copy_for_saving": copied,
        "ranks_here": here,
        "total": subject.machine.ram,
        "fits": needed <= subject.machine.ram,
    }


def _teacher(config: RunConfig) -> int:
    """Every rank holds the weights of `distill.teacher` whole in float32; 0 without one.

    What its forward holds for a moment is not counted: less than the model's own activations.
    """
    folder = config.distill.teacher_folder
    if folder is None:
        return 0
    with torch.device("meta"):
        return 4 * parameter_counts(LlmNormForCausalLM(read_config(folder)))["total"]


def _copied(subject: Subject, step: Step) -> int:
    """Saving in the background writes from a copy of this rank's share."""
    return _saved(step) // subject.launch.world if subject.config.checkpoint.overlap else 0


def _saved(step: Step) -> int:
    return step.sum("weight") + step.sum("slots") + step.sum("others")


def _disk(config: RunConfig, step: Step) -> dict[str, Any]:
    """Checkpoints kept, one more while it is written, and the finished model."""
    needed = _saved(step) * (config.checkpoint.keep + 1) + step.sum("weight")
    free = free_disk(config.output.dir)
    return {
        "checkpoint": _saved(step),
        "needed": needed,
        "free": free,
        "fits": needed <= free,
    }


def _time(subject: Subject, flops: float) -> dict[str, Any]:
    """CPU ranks share the processor whose rate is measured; every GPU has the rate of its own."""
    rate, source = peak_flops(subject.machine.device, subject.precision)
    cuda = subject.machine.device.type == "cuda"
    plan, world = subject.plan, subject.launch.world if cuda else 1
    low, high = _EFFICIENCY[subject.machine.device.type]
    total = flops * plan.steps * plan.tokens_per_step
    return {
        "flops_per_token": flops,
        "rate": rate,
        "rate_from": source,
        "efficiency": [low, high],
        "seconds": [total / (rate * world * high), total / (rate * world * low)],
    }
