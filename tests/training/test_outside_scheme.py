"""A norm and a placement from outside llmnorm: the worked example of CONTRIBUTING, run as it is."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmnorm import self_test
from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.errors import ConfigError
from llmnorm.modeling import operations
from llmnorm.placements import PLACEMENTS
from llmnorm.testing.saving import load_as_stranger
from llmnorm.training.loop import train

from .conftest import metrics, tiny_words

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```\w+ ([\w.]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = dict(BLOCK.findall(CONTRIBUTING.read_text(encoding="utf-8")))
MODULES = ("max_norm", "damped")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the example's files, on Python's path; nothing is imported yet."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield folder
    operations.OPERATIONS.pop("max_norm", None)
    if "max_norm" in operations._NORMS:
        operations._NORMS.remove("max_norm")
    PLACEMENTS.pop("damped", None)
    for module in MODULES:
        sys.modules.pop(module, None)


@pytest.mark.fast
def test_the_example_has_at_most_45_lines_of_code() -> None:
    assert set(FILES) == {"max_norm.py", "damped.py", "run.yaml", "check.py"}
    assert sum(len(text.splitlines()) for text in FILES.values()) <= 45


def test_an_outside_scheme_is_trained_from_a_run_file_saved_and_loaded_without_llmnorm(
    outside: Path, data: Prepared, tmp_path: Path
) -> None:
    words = tiny_words(data.path, tmp_path / "run")
    rest = [
        word
        for key, value in zip(words[::2], words[1::2], strict=True)
        if key != "--model.preset"
        for word in (key, value)
    ]
    config = load_run_config(outside / "run.yaml", rest)
    assert train(config) == 0
    losses = [record["train/loss"] for record in metrics(config.output.dir)]
    assert losses[-1] < losses[0] - 1

    final = config.output.dir / "final"
    written = json.loads((final / "config.json").read_text())
    assert written["residuals"][1]["mlp"] == {
        "pre": {"op": "max_norm", "eps": 1e-5, "scale": 1.0},
        "skip": {"op": "constant", "value": 0.8},
    }
    model = AutoModelForCausalLM.from_pretrained(final)
    self_test(model, fresh=False)

    saved, ids = tmp_path / "saved", torch.arange(20).view(2, 10)
    shutil.copytree(final, saved / "final")
    save_file({"ids": ids, "logits": model(ids).logits.detach()}, saved / "final.safetensors")
    equal = load_as_stranger(saved, without={"llmnorm", *MODULES}, home=tmp_path / "home")
    assert equal == {"final": True, "saved again": True}


def test_the_example_passes_every_check_in_a_process_of_its_own(outside: Path) -> None:
    done = subprocess.run(
        [sys.executable, "check.py"],
        cwd=outside,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "max_norm + damped" in lines
    assert "  saving: loaded without damped, llmnorm, max_norm" in lines


def test_a_norm_whose_code_cannot_be_saved_stops_the_run_before_it_trains(
    outside: Path, data: Prepared, tmp_path: Path
) -> None:
    """Its file imports another one, which the saved model would miss."""
    (outside / "beside.py").write_text("")
    norm = outside / "max_norm.py"
    norm.write_text(f"import beside\n{norm.read_text()}")
    words = tiny_words(data.path, tmp_path / "run", model__imports=["max_norm"])
    config = load_run_config(None, [*words, "--model.norm.op", "max_norm"])
    with pytest.raises(ConfigError, match=r"max_norm\.py:1: MaxNorm must travel with the model"):
        train(config)
    assert not (config.output.dir / "metrics.jsonl").exists()


@pytest.mark.fast
def test_a_scheme_whose_module_is_not_imported_is_unknown(outside: Path) -> None:
    with pytest.raises(ValueError, match="no norm has this name"):
        load_run_config(outside / "run.yaml", ["--model.imports", "[]"])
    importlib.import_module("max_norm")
    importlib.import_module("damped")
    with pytest.raises(ValueError, match="output") as caught:
        load_run_config(outside / "run.yaml", ["--model.imports", "[]"])
    assert "model.norm" not in str(caught.value)
    assert "model.placement" not in str(caught.value)
