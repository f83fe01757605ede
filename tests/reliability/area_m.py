"""M: the supply chain. What is imported is declared, and importing it reaches for nothing."""

import ast
import ctypes
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from reliability.harness import Trial, bar

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = sorted((_ROOT / "llmnorm").rglob("*.py"))
_FOLDERS = [_ROOT / name for name in ("train", "eval", "benchmarks")]
_SCRIPTS = [path for folder in _FOLDERS for path in sorted(folder.rglob("*.py"))]
_PARTS = 8
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_REACHING = ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen")


def _declared() -> set[str]:
    """Modules of the standard library and of every declared package, extras included."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    names = {re.split(r"[<>=!~ ;\[]", line)[0].lower().replace("_", "-") for line in lines}
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if names & {owner.lower().replace("_", "-") for owner in owners}
    }
    given = {name.replace("-", "_") for name in names} | {"flash_attn", "liger_kernel"}
    return modules | given | {"llmnorm", *sys.stdlib_module_names}


@bar("M1", "every import is of the standard library or a declared package",
     total=_PARTS, ci=_PARTS)  # fmt: skip
def declared(trial: Trial) -> None:
    # The last are what declared packages bring along and offer as their own interface.
    known = _declared() | {"pydantic_core", "pyarrow", "huggingface_hub"}
    for path in [*_SOURCES, *_SCRIPTS][trial.index :: _PARTS]:
        beside = {file.stem for file in path.parent.glob("*.py")} if path in _SCRIPTS else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            strangers = {name.split(".")[0] for name in names} - known - beside
            assert not strangers, f"{path}:{node.lineno}: {strangers} is not declared"


@bar("M2", "importing a module connects to nothing and starts nothing",
     total=len(_SOURCES), ci=40)  # fmt: skip
def quiet_import(trial: Trial) -> None:
    parts = _SOURCES[trial.index].relative_to(_ROOT).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    if name == "llmnorm.__main__" or "._data" in name:
        return
    seen: list[str] = []
    sys.addaudithook(lambda event, given: seen.append(event) if event in _REACHING else None)
    ctypes.CDLL(None).unshare(_NEW_NETWORK)
    for loaded in [module for module in sys.modules if module.split(".")[0] == "llmnorm"]:
        if ".modeling" not in loaded and ".placements" not in loaded:
            del sys.modules[loaded]
    importlib.import_module(name)
    assert not seen, f"importing {name}: {seen}"
