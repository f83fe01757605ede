"""Let norms and joints that were registered outside this package travel with a saved model.

A saved folder must load where neither llmnorm nor the user's package is installed. The source file
of a foreign operation or residual module is copied beside the modeling code, and the copy of
`configuration_llmnorm.py` imports it. What cannot travel is refused before anything is written. A
placement need not travel: what it resolved to is in `config.json`.
"""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from torch import nn

from .operations import OPERATIONS
from .residual import Residual

_PACKAGE = __name__.rpartition(".")[0]
_OFFERED = {
    "compute_dtype": "operations",
    "register_gain": "operations",
    "register_norm": "operations",
    "Residual": "residual",
    "register_residual": "residual",
}


def foreign_sources(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Module name -> (class name, source made relative) of every foreign class in the model.

    Raises:
        ValueError: for a class of `__main__`, or a file that imports what will not be there: files
            beside it, or more of llmnorm than `register_norm`, `register_gain`, `compute_dtype`,
            `Residual` and `register_residual`.
    """
    known = (*OPERATIONS.values(), Residual)
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
    source = Path(file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not _is_installed(node):
            offered = isinstance(node, ast.ImportFrom) and str(node.module).startswith("llmnorm")
            names = {alias.name for alias in node.names}
            if not (offered and names <= set(_OFFERED) and node.lineno == node.end_lineno):
                raise ValueError(
                    f"{file}:{node.lineno}: {cls.__name__} must travel with the model, where this "
                    f"import is missing; use installed packages and llmnorm's {sorted(_OFFERED)}"
                )
            lines[node.lineno - 1] = "".join(
                f"{lines[node.lineno - 1][: node.col_offset]}from .{_OFFERED[alias.name]} import "
                f"{alias.name}{f' as {alias.asname}' if alias.asname else ''}\n"
                for alias in node.names
            )
    return "".join(lines)


def _is_installed(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is of the standard library or of an installed package but llmnorm."""
    if isinstance(node, ast.ImportFrom) and node.level:
        return False
    modules = (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
    )
    roots = {str(module).partition(".")[0] for module in modules}
    known = sys.stdlib_module_names | packages_distributions().keys()
    return "llmnorm" not in roots and roots <= known


def write_sources(sources: dict[str, tuple[str, str]], folder: Path) -> None:
    """Write the foreign files and let the folder's configuration file import them."""
    configuration = folder / "configuration_llmnorm.py"
    for module, (cls, source) in sources.items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        with configuration.open("a", encoding="utf-8") as file:
            file.write(f"\nfrom .{module} import {cls}  # noqa: E402, F401 (registers itself)\n")
