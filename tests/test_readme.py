"""The README's commands run, at tiny settings, and so do the steps of the quickstart."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes a training tiny. The shape is smaller too, so that a step takes milliseconds.
TINY = (
    "--training.max_steps 3 --training.global_batch_size 2 --data.seq_len 64 --eval.max_documents 1"
    " --model.overrides.num_hidden_layers 2 --model.overrides.hidden_size 32"
    " --model.overrides.intermediate_size 64 --training.precision fp32"
)


def blocks(mark: str) -> list[str]:
    """Contents of the README's fenced blocks that begin with ```MARK."""
    return re.findall(rf"^```{re.escape(mark)}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def environment() -> dict[str, str]:
    """The programs of this interpreter first, one thread, no network."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory that looks like a checkout, so that commands write nothing into the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train", "eval", "configs", "models"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    return folder


def test_the_two_make_targets_stand_on_page_one():
    page_one = README[:4000]
    for target in ("make quickstart", "make test"):
        assert target in page_one
        assert re.search(rf"^{target.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_the_readme_names_is_there():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    assert len(named) > 5
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def run_in(folder: Path, *words: str) -> None:
    """Run a command to its end and show what it said if it failed."""
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run_and_then_its_python(folder):
    commands = [
        line.strip()
        for block in blocks("sh test")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(commands) == 8  # the five, the export, and two that list schemes
    for command in commands:
        run_in(folder, "bash", "-c", f"{command} {TINY}" if "pretrain.py" in command else command)
    assert len(blocks("python test")) == 2
    for block in blocks("python test"):
        run_in(folder, sys.executable, "-W", "error", "-c", block)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_of_the_quickstart_run_and_leave_what_they_promise(folder, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "train" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    assert quickstart.SCHEMES == ["pre_ln-rmsnorm", "peri_ln-rmsnorm", "lns-rmsnorm", "pre_ln-derf"]
    monkeypatch.setattr(quickstart, "SCHEMES", ["pre_ln-rmsnorm", "pre_ln-derf"])
    monkeypatch.chdir(folder)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    quickstart.main(TINY.split())
    out = capfd.readouterr().out
    for words in (
        "pre_ln + derf",
        "validation loss",
        "chance 0.250",
        "not a ranking",
        "generate runs",
    ):
        assert words in out
    runs = folder / "runs" / "quickstart"
    assert (runs / "loss_curves.png").stat().st_size > 10_000
    for scheme in quickstart.SCHEMES:
        assert (runs / scheme / "eval" / "perplexity-python-stdlib-val.json").is_file()
        assert (runs / scheme / "eval" / "harness-python_stdlib_continuation.json").is_file()
