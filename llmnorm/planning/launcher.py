"""How a run would be started: by options, or by a file of `accelerate launch`."""

from pathlib import Path
from typing import Any

from llmnorm.config.document import MAX_BYTES, read_document
from llmnorm.config.problems import one_line
from llmnorm.errors import ConfigError
from llmnorm.planning.forecast import Launch
from llmnorm.training.engines import asked_kind, deepspeed_config, fsdp2

_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")


def from_options(engine: str | None, processes: int | None) -> Launch:
    """Return what `--engine` and `--processes` mean; several processes are DDP by themselves.

    Raises:
        ConfigError: if they contradict each other.
    """
    world = processes
    if world is None:
        world = 1 if engine in (None, "plain") else 2
    if world < 1:
        raise ConfigError(f"--processes {world}: expected at least 1")
    engine = engine or ("plain" if world == 1 else "ddp")
    if (engine == "plain") != (world == 1) and engine in ("plain", "ddp"):
        other = "ddp" if engine == "plain" else "plain"
        raise ConfigError(f"--engine {engine} --processes {world}: that is the engine {other}")
    return Launch(engine=engine, world=world)


def from_file(path: Path, processes: int | None) -> Launch:
    """Return what a file of `accelerate launch --config_file` asks for.

    Raises:
        ConfigError: if it cannot be read, or as the engine would refuse it.
        EnvironmentProblem: as the engine would refuse it.
    """
    settings = _read(path)
    world = settings.get("num_processes", 1) if processes is None else processes
    if not isinstance(world, int) or world < 1:
        raise ConfigError(f"--accelerate {path}: num_processes is {world!r}, expected at least 1")
    environment = _environment(path, world)
    kind, named = asked_kind(environment), settings.get("distributed_type", "NO")
    if named not in _KINDS:
        raise ConfigError(
            f"--accelerate {path}: distributed_type is {named!r}; expected one of "
            f"{', '.join(_KINDS)}"
        )
    if kind == "fsdp2":
        fsdp2.read_settings(environment)
        return Launch(engine="fsdp2", world=world)
    if kind == "deepspeed":
        zero = deepspeed_config.read_settings(environment)
        stage = zero[0]["zero_optimization"]["stage"]
        return Launch(engine=f"zero{stage}", world=world, zero=zero)
    return Launch(engine="plain" if world == 1 else "ddp", world=world)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as handle:
            text = handle.read(MAX_BYTES + 1).decode("utf-8")
        settings = read_document(text, str(path)).value
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--accelerate {path}: cannot be read as text ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--accelerate {path}: expected a mapping as of configs/accelerate/")
    return settings


def _environment(path: Path, world: int) -> dict[str, str]:
    """Return the environment in which accelerate would start the processes, as itself makes it."""
    from accelerate.commands import launch
    from accelerate.utils import launch as prepare

    words = ["--config_file", str(path), "--num_processes", str(world), "train"]
    try:
        args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
        args.main_process_port = 0  # any free one: nothing is started
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ""
            return prepare.prepare_deepspeed_cmd_env(args)[1]
        if args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
            return prepare.prepare_multi_gpu_env(args)
        return prepare.prepare_simple_launcher_cmd_env(args)[1]
    except Exception as error:  # with which `accelerate launch` would end, whatever it is
        raise ConfigError(
            f"--accelerate {path}: accelerate cannot launch with it: {one_line(str(error))}"
        ) from error
