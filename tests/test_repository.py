"""The shape of the repository: one-way imports, short files, no dangerous calls, true metadata."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmnorm"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "train").glob("*.py"), *(ROOT / "eval").glob("*.py")])

# Imports point to smaller numbers or stay within the same entry.
LAYERS = {
    "errors": 0,
    "durable": 1,
    "environment": 1,
    "papers": 1,
    "processes": 1,
    "resources": 1,
    "running_norms": 1,
    "safe_files": 1,
    "modeling": 2,
    "placements": 3,
    "calibration": 3,
    "selftest": 4,
    "build": 4,
    "": 5,  # llmnorm/__init__.py, the public API
    "config": 6,
    "testing": 6,
    "data": 6,
    "drawing": 6,
    "recipes": 6,
    "evaluation": 7,
    "export": 8,
    "training": 8,
    "listing": 9,
    "planning": 9,
    "doctor": 9,
    "verify": 9,
    "cli": 9,
    "__main__": 10,
}
TOP_LEVEL = {
    "pyproject.toml",
    "llmnorm",
    "models",
    "train",
    "eval",
    "tests",
    "configs",
    "README.md",
    "docs",
    "benchmarks",
    "Makefile",
    "constraints.txt",
    "requirements.lock",
    ".ci",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    ".pre-commit-config.yaml",
    ".gitignore",
}
FORBIDDEN = {
    "pickle": r"\b(pickle|dill|cloudpickle|joblib|shelve|marshal)\.(load|loads|open|Unpickler)\b",
    "torch.load": r"\btorch\.load\(",
    "allow_pickle": r"allow_pickle\s*=\s*True",
    "os.system": r"\bos\.(system|popen)\(",
    "yaml.load": r"\byaml\.(unsafe_|full_)?load(_all)?\(",
    "weights_only=False": r"weights_only\s*=\s*False",
    "shell=True": r"shell\s*=\s*True",
    "eval and exec": r"(?<![\w.])(eval|exec)\(",
    "extractall": r"\.extractall\(",
    "trust_remote_code": r"trust_remote_code\s*=\s*True",
}


def layer(module: str) -> str:
    """Name of the entry of LAYERS that a module of ours belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "llmnorm":  # from llmnorm import build: a module, or a public name
                for alias in node.names:
                    yield f"llmnorm.{alias.name}" if alias.name in LAYERS else "llmnorm"
            else:
                yield module


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", LIBRARY, ids=ids(LIBRARY))
def test_imports_point_one_way(path):
    here = layer(module_name(path))
    assert here in LAYERS, f"{here} is new; give it a place in LAYERS"
    for module in imports(path):
        if module.split(".")[0] != "llmnorm":
            continue
        there = layer(module)
        inward = LAYERS[there] < LAYERS[here]
        assert there == here or inward or {here, there} == {"build", "selftest"}, module


@pytest.mark.parametrize("path", sorted((PACKAGE / "modeling").rglob("*.py")), ids=lambda p: p.name)
def test_what_travels_with_checkpoints_is_flat_and_imports_only_torch_and_transformers(path):
    assert path.parent == PACKAGE / "modeling"
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert "." not in (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed


def test_data_imports_only_the_lowest_layers_of_ours():
    for path in sorted((PACKAGE / "data").rglob("*.py")):
        ours = {layer(module) for module in imports(path) if module.startswith("llmnorm")}
        assert ours <= {"data", "durable", "environment", "errors", "resources", "safe_files"}, path


def _normal(package: str) -> str:
    return package.lower().replace("_", "-")


def test_nothing_optional_is_imported_at_module_level():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {_normal(re.split(r"[<>=!~ ;\[]", line)[0]) for line in declared}
    provided = importlib.metadata.packages_distributions()
    core = {module for module, owners in provided.items() if names & {*map(_normal, owners)}}
    core |= {"llmnorm", "pydantic_core", *sys.stdlib_module_names}
    for path in LIBRARY:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import):
                modules = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = {(node.module or "").split(".")[0]}
            else:
                continue
            assert modules <= core, f"{path}: {modules - core} is not a core dependency"


@pytest.mark.parametrize("path", LIBRARY, ids=ids(LIBRARY))
def test_files_and_functions_of_the_library_fit_their_limits(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = first.end_lineno if documented else node.lineno
            length = (node.end_lineno or 0) - (start or 0)
            assert length <= 40, f"{node.name} has {length} lines below its docstring"


def test_scripts_only_assemble():
    for path in SCRIPTS:
        limit = 60 if path.parent.name == "train" else 40
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path


def test_scripts_cannot_be_mistaken_for_packages():
    for folder in ("models", "train", "eval", "configs"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    for path in SCRIPTS:
        assert importlib.util.find_spec(path.stem) is None, f"{path} hides a package"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_can_run_what_another_file_says(what):
    for path in [*LIBRARY, *SCRIPTS]:
        found = re.search(FORBIDDEN[what], path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


def test_the_forbidden_patterns_find_what_they_are_for():
    bad = {
        "pickle": "joblib.load(f)",
        "torch.load": "torch.load(f)",
        "allow_pickle": "np.load(f, allow_pickle=True)",
        "os.system": "os.popen(command)",
        "yaml.load": "yaml.load(text)",
        "weights_only=False": "torch.load(f, weights_only=False)",
        "shell=True": "run(x, shell=True)",
        "eval and exec": "y = eval(text)",
        "extractall": "archive.extractall('.')",
        "trust_remote_code": "AutoModel.from_pretrained(x, trust_remote_code=True)",
    }
    assert all(re.search(FORBIDDEN[what], text) for what, text in bad.items())
    assert not re.search(FORBIDDEN["eval and exec"], "model.eval()")


def test_the_top_level_holds_what_is_promised_and_nothing_else():
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    assert {line.split("/")[0] for line in listed.splitlines()} == TOP_LEVEL


def test_constraints_pin_every_direct_dependency_to_what_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"]]
    wanted += [
        line
        for name in ("deepspeed", "eval", "gguf", "sft", "tensorboard", "zstd")
        for line in extras[name]
    ]
    names = {re.split(r"[<>=!~ ;\[]", line)[0] for line in wanted} - {"llmnorm"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pins) == names
    for name, version in pins.items():
        assert importlib.metadata.version(name).split("+")[0] == version, name


def test_one_version_stands_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    import llmnorm

    assert llmnorm.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert json.dumps(version) in (ROOT / "llmnorm" / "__init__.py").read_text()


def test_the_licence_is_the_whole_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.strip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "6. Trademarks." in text
