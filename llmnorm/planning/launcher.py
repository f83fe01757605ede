"""How a run would be started: by options, or by a file of `accelerate launch`."""

from pathlib import Path
from typing import Any

from llmnorm.config.document import MAX_BYTES, read_document
from llmnorm.errors import ConfigError
from llmnorm.planning.forecast import Launch
from llmnorm.training.engines.memory import ENGINES

_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")


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
        ConfigError: if it cannot be read or asks for an engine that there is not.
    """
    try:
        with open(path, "rb") as handle:
            text = handle.read(MAX_BYTES + 1).decode("utf-8")
        settings = read_document(text, str(path)).value
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--accelerate {path}: cannot be read as text ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--accelerate {path}: expected a mapping as of configs/accelerate/")
    world = settings.get("num_processes", 1) if processes is None else processes
    kind = settings.get("distributed_type", "NO")
    if not isinstance(world, int) or world < 1:
        raise ConfigError(f"--accelerate {path}: num_processes is {world!r}, expected at least 1")
    if kind == "FSDP":
        return Launch(engine="fsdp2", world=world)
    if kind == "DEEPSPEED":
        return _deepspeed(path, settings.get("deepspeed_config") or {}, world)
    if kind not in _PLAIN:
        raise ConfigError(
            f"--accelerate {path}: distributed_type is {kind!r}; expected one of "
            f"{', '.join((*_PLAIN, 'FSDP', 'DEEPSPEED'))}"
        )
    return Launch(engine="plain" if world == 1 else "ddp", world=world)


def _deepspeed(path: Path, settings: dict[str, Any], world: int) -> Launch:
    """A stage stands in the file itself or, more often, in DeepSpeed's own beside it."""
    from llmnorm.training.engines.deepspeed_config import read_settings

    file = settings.get("deepspeed_config_file")
    stage = settings.get("zero_stage")
    if file is not None:
        given, _ = read_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
        stage = given["zero_optimization"]["stage"]
    engine = f"zero{stage}"
    if engine not in ENGINES:
        raise ConfigError(f"--accelerate {path}: ZeRO stage {stage!r}; expected 1, 2 or 3")
    return Launch(engine=engine, world=world, zero_file=None if file is None else Path(file))
