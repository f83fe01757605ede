"""Let norms that were registered outside this package travel with a saved model.

A saved folder must load where neither llmnorm nor the user's package is installed. The source file
of a foreign operation is copied beside the modeling code, and the copy of
`configuration_llmnorm.py` imports it. What cannot travel is refused before anything is written.
"""

import re
import sys
from pathlib import Path

from torch import nn

from .operations import OPERATIONS

_PACKAGE = __name__.rpartition(".")[0]
_OURS = re.compile(r"^from llmnorm(?:\.modeling\.\w+)? import (.+)$", re.MULTILINE)


def foreign_sources(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Module name -> (class name, source made relative) of every foreign operation in the model.

    Raises:
        ValueError: for a class of `__main__`, or a file that imports more of llmnorm than
            `register_norm`, `register_gain` and `compute_dtype`.
    """
    known = tuple(OPERATIONS.values())
    classes = {type(m) for m in model.modules() if isinstance(m, known)}
    foreign = [cls for cls in classes if cls.__module__.rpartition(".")[0] != _PACKAGE]
    return {_file_name(cls): (cls.__name__, _relative(cls)) for cls in foreign}


def _file_name(cls: type[nn.Module]) -> str:
    """Name of the copied module; the prefix keeps a user's `norms.py` apart from ours."""
    return f"foreign_{cls.__module__.replace('.', '_')}"


def _relative(cls: type[nn.Module]) -> str:
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    if cls.__module__ == "__main__" or file is None:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__}, so its code cannot be saved with the "
            "model; move it to a file of its own and import that"
        )
    source = _OURS.sub(r"from .operations import \1", Path(file).read_text(encoding="utf-8"))
    if re.search(r"^\s*(from|import) llmnorm", source, re.MULTILINE):
        raise ValueError(
            f"{file}: {cls.__name__} must travel with the model, where llmnorm is not installed; "
            "import only register_norm, register_gain and compute_dtype, each line at the top level"
        )
    return source


def write_sources(sources: dict[str, tuple[str, str]], folder: Path) -> None:
    """Write the foreign files and let the folder's configuration file import them."""
    configuration = folder / "configuration_llmnorm.py"
    for module, (cls, source) in sources.items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        with configuration.open("a", encoding="utf-8") as file:
            file.write(f"\nfrom .{module} import {cls}  # noqa: E402, F401 (registers itself)\n")
