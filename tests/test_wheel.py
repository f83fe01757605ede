"""The wheel: installed alone, it finds its presets and recipes from any folder."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("llmnorm-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and, by a .pth line, the third-party packages of this one.

    A folder added by a .pth file does not process its own .pth files, so an editable llmnorm of
    this environment stays invisible.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "host.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "venv" / "bin"


def test_the_wheel_holds_the_package_with_presets_and_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llmnorm"}
    for folder in ("models", "configs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        packed = {f"llmnorm/_data/{path.relative_to(ROOT).as_posix()}" for path in files}
        assert packed <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_debug_builds_by_name_from_another_directory(installed, tmp_path):
    code = """
import llmnorm, torch
from llmnorm.config import load_run_config
from llmnorm.resources import list_presets
model = llmnorm.build_model(llmnorm.build_config("debug", norm="dyt", placement="lns"))
logits = model(torch.zeros(1, 3, dtype=torch.long)).logits
print(llmnorm.__file__, tuple(logits.shape), load_run_config("quickstart").model.preset)
print(*list_presets())
"""
    first, presets = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    location, rest = first.split(" ", 1)
    assert Path(location).is_relative_to(installed.parent)
    assert rest == "(1, 3, 4096) debug"
    assert presets.split()[0] == "debug"
    assert presets.split()[-1] == "7b"


def test_the_command_of_the_wheel_finds_recipes_by_name(installed, tmp_path):
    assert "  preset: 130m\n" in run(
        installed / "llmnorm", "validate", "--resolve", "pretrain/130m", cwd=tmp_path
    )
