"""DeepSpeed's settings: the launcher's file or variables, held against the run file.

The launcher decides stage and world, the run file everything that changes numbers. So `auto` and
absent settings are filled here, what a user's own file repeats must agree (`Promises`), and what
would train another way than the other engines is refused by name.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmnorm.errors import ConfigError, EnvironmentProblem
from llmnorm.resources import engine_file, suggest
from llmnorm.safe_files import read_json
from llmnorm.training.engines import asked
from llmnorm.training.precision import Precision

logger = logging.getLogger(__name__)

Settings = dict[str, Any]

FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_BUCKET = 50_000_000
"""Elements of a gradient bucket: 200 MB of float32, where DeepSpeed's default is 2 GB."""

_BATCH = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "the number of micro-batches of a step",
    "gradient_clipping": "training.clip_norm",
}
_HARMLESS = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger"),
}
_PRECISION = {"bf16", "fp16", "torch_autocast"}
_ZERO = {
    *("stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
    *("allgather_bucket_size", "allgather_partitions", "use_multi_rank_bucket_allreduce"),
    *("sub_group_size", "memory_efficient_linear", "offload_optimizer", "offload_param"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
    "stage3_allgather_sequential",
}
_REASONS = {
    "optimizer": "the optimizer is the run file's",
    "scheduler": "the learning rate's schedule is the run file's",
    "data_types": "gradients are accumulated in float32",
    "amp": "precision is the run file's",
}


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What a user's own file says of the batch and of clipping, to be compared with each step."""

    source: str
    values: dict[str, float]

    def check(self, seen: Mapping[str, float]) -> None:
        """Compare.

        Raises:
            ConfigError: naming the first value that differs from the run's.
        """
        for key, promised in self.values.items():
            if key in seen and seen[key] != promised:
                raise ConfigError(
                    f"{self.source}: {key} is {promised:g}, but the run file makes it "
                    f"{seen[key]:g} ({_BATCH[key]}); set it to auto, or change the run file"
                )


def read_settings(environment: Mapping[str, str]) -> tuple[Settings, Promises]:
    """Return the settings that the launcher asks for, those of the batch apart.

    Raises:
        ConfigError: for a file that cannot be read, and settings that this engine does not have.
        EnvironmentProblem: if accelerate would run another engine.
    """
    if asked("ACCELERATE_USE_CPU", environment):
        raise EnvironmentProblem(
            "the launcher asked for DeepSpeed and use_cpu at once, with which accelerate runs "
            "DDP; set use_cpu: false (without a GPU DeepSpeed runs on the CPU by itself)"
        )
    file = environment.get(FILE, "none")
    source = "the launcher" if file == "none" else file
    given = _from_variables(environment) if file == "none" else _from_file(Path(file))
    _refuse(given, source)
    values = {key: given.pop(key) for key in _BATCH if key in given}
    values = {key: value for key, value in values.items() if value != "auto"}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{source}: {key} is {value!r}; expected a number or auto")
    return given, Promises(source=source, values=values)


def _from_variables(environment: Mapping[str, str]) -> Settings:
    """The settings of a launch without a file: the stage, and what `accelerate` takes beside."""
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if not stage.isdigit():
        raise ConfigError(f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage!r}; expected 1, 2 or 3")
    zero: Settings = {"stage": int(stage)}
    for what in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        zero[f"offload_{what}"] = {"device": device}
    settings: Settings = {"zero_optimization": zero}
    for key, kind in (("gradient_clipping", float), ("gradient_accumulation_steps", int)):
        text = environment.get(f"ACCELERATE_{key.upper()}", "auto")
        try:
            settings[key] = "auto" if text in ("auto", "none") else kind(text)
        except ValueError as error:
            raise ConfigError(f"ACCELERATE_{key.upper()}={text!r}; expected a number") from error
    return settings


def _from_file(path: Path) -> Settings:
    own = engine_file(path.stem)
    if not path.is_file() and path.parts[-3:] == own.parts[-3:]:
        path = own  # configs/accelerate/*.yaml name it as seen from a checkout
    try:
        settings = read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there, seen from {Path.cwd()}; mend the path") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected DeepSpeed's settings as JSON; {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of DeepSpeed's settings")
    return settings


def _refuse(settings: Settings, source: str) -> None:
    """Refuse what is unknown, offloads, or makes other numbers than the other engines."""
    for key in settings:
        known = {*_BATCH, *_HARMLESS, *_PRECISION}
        if key not in known:
            reason = _REASONS.get(key, f"this engine does not have it{suggest(key, sorted(known))}")
            raise ConfigError(f"{source}: {key} is refused: {reason}; remove it")
    _check_kinds(settings, source)
    zero = settings.get("zero_optimization")
    if (
        not isinstance(zero, dict)
        or type(zero.get("stage")) is not int
        or not 1 <= zero["stage"] <= 3
    ):
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        raise ConfigError(
            f"{source}: zero_optimization.stage is {stage!r}; expected 1, 2 or 3 (without sharding "
            "use configs/accelerate/ddp.yaml)"
        )
    for key, value in zero.items():
        if key not in _ZERO:
            hint = suggest(key, sorted(_ZERO))
            raise ConfigError(
                f"{source}: zero_optimization.{key} is refused: this engine does not have it{hint}"
            )
        if key.startswith("offload") and (value or {}).get("device", "none") != "none":
            raise ConfigError(
                f"{source}: zero_optimization.{key} is refused: with it DeepSpeed's steps are not "
                "those of the other engines; remove it and use a higher stage or more processes"
            )


def _check_kinds(settings: Settings, source: str) -> None:
    """Refuse values of a kind that would be passed over or fail later."""
    zero = settings.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    offloads = {f"zero_optimization.{key}": zero.get(key) for key in zero if "offload" in key}
    for key, value in {**{key: settings.get(key, {}) for key in _PRECISION}, **offloads}.items():
        if not isinstance(value, dict) and not (value is None and key in offloads):
            raise ConfigError(f"{source}: {key} is {value!r}; expected a mapping")
        enabled = (value or {}).get("enabled", "auto")
        if enabled not in ("auto", True, False) or type(enabled) is int:
            raise ConfigError(f"{source}: {key}.enabled is {enabled!r}; expected true or false")
    for key, value in zero.items():
        if key.endswith(("_size", "_threshold")) and value != "auto" and type(value) is not int:
            raise ConfigError(f"{source}: zero_optimization.{key} is {value!r}; expected a number")


def fill_settings(
    given: Settings, source: str, precision: Precision, world: int, hidden_size: int
) -> Settings:
    """Return complete settings for `deepspeed.initialize`.

    Batch and accumulation are nominal: the engine runs each micro-batch and says which is the last.
    Gradients travel in float32 also under autocast (DeepSpeed would send bfloat16), so that they
    are those of the other engines.

    Raises:
        ConfigError: if the precision contradicts the run file's.
    """
    zero = dict(given["zero_optimization"])
    fill = {
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": 2 * _BUCKET,
        "memory_efficient_linear": False,  # replaces F.linear everywhere by another arithmetic
    }
    if zero["stage"] == 3:
        fill |= {
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 10 * hidden_size,  # the vectors
        }
    for key, value in fill.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    settings = {key: value for key, value in given.items() if key not in _PRECISION}
    return settings | {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "steps_per_print": given.get("steps_per_print", 2**31),
        **_precision(given, source, precision),
    }


def _precision(given: Settings, source: str, precision: Precision) -> Settings:
    """The settings of precision: autocast over float32 weights, or bfloat16 weights on demand."""
    bf16 = precision.name == "bf16"
    own = _asked(given, "bf16")
    if _asked(given, "fp16"):
        raise ConfigError(f"{source}: fp16 is refused: precision is the run file's; remove it")
    autocast = given.get("torch_autocast", {})
    wanted = "auto" if own else autocast.get("enabled", "auto")
    if (own and not bf16) or wanted not in ("auto", bf16):
        key = "bf16" if own else "torch_autocast"
        raise ConfigError(
            f"{source}: {key}.enabled is {str(own or wanted).lower()}, but training.precision is "
            f"{precision.name}; set it to auto, or change the run file"
        )
    if own:
        logger.warning(
            "%s asks for DeepSpeed's bf16: the model's weights are bfloat16 beside float32 "
            "masters, so losses are not those of other engines (torch_autocast is)",
            source,
        )
        return {"bf16": {**given["bf16"], "check_grad_overflow": True}}  # skips bad steps
    safe = autocast.get("lower_precision_safe_modules", [])
    return {
        "torch_autocast": {
            "enabled": bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": safe,
        }
    }


def _asked(settings: Settings, key: str) -> bool:
    return settings.get(key, {}).get("enabled", False) is True
