"""Find the presets (`models/`) and recipes (`configs/`) that travel with llmnorm.

In a checkout they stand at the repository's root; the wheel carries them in `llmnorm/_data`.
"""

import difflib
import os
import re
from pathlib import Path

from llmnorm.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def _root() -> Path:
    packed = _PACKAGE / "_data"
    return packed if packed.is_dir() else _PACKAGE.parent


def suggest(name: str, known: list[str]) -> str:
    """Return `; did you mean X?` with the nearest of `known`, or all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def list_presets() -> list[str]:
    """Return the names of the architecture presets, smallest first."""
    folders = [path.parent.name for path in _root().glob("models/*/config.json")]
    return sorted(folders, key=_size)


def preset_folder(name: str) -> Path:
    """Return the folder of the preset `name`; it holds a Hugging Face `config.json`.

    Raises:
        ConfigError: when there is no preset of this name; the message suggests the nearest.
    """
    if name not in list_presets():
        raise ConfigError(
            f"no preset or folder is named {name!r:.80}{suggest(name, list_presets())}"
        )
    return _root() / "models" / name


def shape_folder(base: str) -> Path:
    """Return the folder that `base` means: one that holds `config.json`, else the preset's.

    Raises:
        ConfigError: when it is neither.
    """
    folder = os.path.expanduser(base)
    if os.path.isfile(os.path.join(folder, "config.json")):
        return Path(folder)
    if base not in list_presets() and os.path.isdir(folder):
        raise ConfigError(f"{base}: this folder has no config.json")
    return preset_folder(base)


def list_recipes() -> list[str]:
    """Return the names of the run recipes, such as `quickstart` and `pretrain/130m`."""
    folder = _root() / "configs"
    files = [*folder.glob("*.yaml"), *folder.glob("pretrain/*.yaml")]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    return sorted(names, key=_size)


def config_file(name: str) -> Path:
    """Return the run file `name`: a path, or the name of a recipe that llmnorm carries.

    `quickstart`, `configs/quickstart.yaml` and `pretrain/130m` work from any folder.

    Raises:
        ConfigError: when neither a file nor a recipe has this name.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Path(path)
    recipe = name.removeprefix("configs/").removesuffix(".yaml")
    if recipe in list_recipes():
        return _root() / "configs" / f"{recipe}.yaml"
    hint = suggest(recipe, list_recipes())
    raise ConfigError(f"{name!r:.200} is neither a file nor the name of a recipe{hint}")


def engine_file(name: str) -> Path:
    """Return the file of DeepSpeed's settings that llmnorm carries, such as that of `zero2`."""
    return _root() / "configs" / "deepspeed" / f"{name}.json"


def _size(name: str) -> tuple[float, str]:
    """Sort key: the parameter count in a name like `130m`; names without one come first."""
    match = re.fullmatch(r"(?:.*/)?(\d+)([mb])", name)
    return (int(match[1]) * {"m": 1e6, "b": 1e9}[match[2]] if match else 0.0, name)
