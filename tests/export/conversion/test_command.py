"""`llmnorm convert` to norms that training makes good: what it writes and says."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmnorm.cli import run_command
from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.errors import ConfigError, DataError
from llmnorm.export import convert
from llmnorm.training.loop import train

from ...training.conftest import metrics


def command(*words: object) -> int:
    return run_command(convert, "llmnorm convert", [str(word) for word in words])


@pytest.mark.parametrize("op", ["dyt", "derf"])
def test_a_fitted_model_is_near_its_source_and_trains_on_by_the_printed_command(
    op: str,
    trained: Path,
    data: Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / op
    assert command(trained, "--to", op, "--data", data.path, "--out", out, "--steps", 2) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "conversion.json").read_text())
    before, after = record["loss"]
    assert before < after < before + 0.4
    assert len(record["fitted"]) == 5
    assert "model.layers.1.mlp_residual.pre" in said
    assert f"{before:.4f} as trained, {after:.4f} converted" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.norm["op"] == op
    assert model.config.placement == {"name": "pre_ln"}
    words = shlex.split(said.splitlines()[-1])[3:]
    run = load_run_config(None, [*words, "--training.precision", "fp32"])
    train(run)
    assert metrics(run.output.dir)[0]["train/divergence"] < 0.4


def test_a_taper_begins_as_the_model_that_it_was(
    trained: Path, data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [trained, "--to", "tapernorm", "--data", data.path, "--out", tmp_path / "taper"]
    with pytest.raises(ConfigError, match="say how many with --steps N"):
        command(*words)
    assert command(*words, "--steps", 50) == 0
    record = json.loads((tmp_path / "taper" / "conversion.json").read_text())
    assert record["loss"][0] == pytest.approx(record["loss"][1], rel=1e-6)
    assert record["norm"] == {"op": "tapernorm", "warmup_steps": 5, "taper_steps": 30}
    assert {site["error"] < 1e-5 for site in record["fitted"]} == {True}


def test_what_cannot_be_converted_is_one_line(
    trained: Path, data: Prepared, tmp_path: Path
) -> None:
    words = [trained, "--to", "dyt", "--out", tmp_path / "out"]
    with pytest.raises(ConfigError, match="name it with --data PREPARED_FOLDER"):
        command(*words)
    with pytest.raises(DataError, match="are wanted to fit on; give more text or fewer --tokens"):
        command(*words, "--data", data.path, "--tokens", 10**7)
    assert not (tmp_path / "out").exists()
