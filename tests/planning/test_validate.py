"""`llmnorm validate`: what it checks, what it says, how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.cli import run_command
from llmnorm.config import load_run_config
from llmnorm.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from llmnorm.planning import command, forecast, machine
from llmnorm.planning.launcher import from_file, from_options
from llmnorm.training.loop import train

ACCELERATE = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


@pytest.fixture
def validate(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Callable:
    """Return the JSON of a small run; an error is raised after it was printed."""

    def run(*options: str, **changes: Any) -> dict[str, Any]:
        arguments = ["--json", *options, *words(**changes)]
        capsys.readouterr()  # what came before
        assert run_command(command, "llmnorm validate", arguments) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_sound_run_is_described_and_nothing_is_written(validate, tmp_path):
    before = set(tmp_path.iterdir())
    record = validate("--processes", "2", training__global_batch_size=5)
    assert set(tmp_path.iterdir()) == before
    assert record["start"] == "a new run"
    assert record["batch"]["padding"] == 1  # 2 ranks x 3 sequences for 5
    assert set(record["memory"]["engines"]) == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    assert record["problems"] == []
    assert record["time"]["seconds"][0] < record["time"]["seconds"][1]


def test_the_table_names_the_engines_and_what_is_not_counted(words, capsys):
    assert run_command(command, "llmnorm validate", words()) == 0
    out = capsys.readouterr().out
    assert "plain x 1" in out
    assert "this run: fits" in out
    assert "Not counted: an allocator's fragmentation" in out
    assert out.endswith("all checks passed: the run can start\n")


def test_recomputed_activations_are_fewer(validate):
    activations = validate()["memory"]["activations"]
    assert activations["otherwise"] < activations["as_is"]
    again = validate(training__activation_checkpointing=True)["memory"]["activations"]
    assert again["as_is"] == activations["otherwise"]


def test_checkpoint_and_parameters_are_those_of_the_run(validate, words, tmp_path):
    record = validate()
    assert train(load_run_config(None, words())) == 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["parameters"] == environment["parameters"]
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    written = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert record["disk"]["checkpoint"] == pytest.approx(written, rel=0.05)
    assert "is finished" in validate()["start"]


def test_everything_wrong_is_told_and_the_first_gives_the_code(words, tmp_path, capsys):
    changes = {"data__path": str(tmp_path / "none"), "training__init_from": str(tmp_path)}
    with pytest.raises(DataError, match="none"):
        run_command(command, "llmnorm validate", words(**changes))
    out, err = capsys.readouterr()
    assert "memory per rank" in out  # of the preset's own vocabulary
    assert err.count("\n") == 1
    assert "training.init_from" in err


def test_weights_of_another_shape_are_refused_without_reading_them(validate, words, tmp_path):
    assert train(load_run_config(None, words())) == 0
    other = {"output__dir": str(tmp_path / "other"), "training__init_from": f"{tmp_path}/run/final"}
    assert validate(**other)["start"].startswith("a new run with the weights of")
    wider = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(CheckpointError, match="holds another model"):
        validate(**other, model__overrides=wider)


def test_a_run_directory_of_another_configuration_is_refused(validate, words):
    assert train(load_run_config(None, words())) == 0
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.001 became 0.002"):
        validate(optimizer__lr=0.002)


def test_a_run_that_does_not_fit_ends_as_the_machines_problem(validate, monkeypatch):
    monkeypatch.setattr(machine, "usable_ram", lambda: machine.RESERVE["cpu"] + 1_000_000)
    with pytest.raises(EnvironmentProblem, match="does not fit: plain needs"):
        validate()
    monkeypatch.undo()
    monkeypatch.setattr(forecast, "free_disk", lambda path: 1_000_000)
    with pytest.raises(EnvironmentProblem, match="free are 1 MB"):
        validate()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "engine", "world"),
    [
        ("cpu", "plain", 1),
        ("ddp", "ddp", 2),
        ("fsdp2", "fsdp2", 2),
        ("multinode", "ddp", 16),
        ("zero1", "zero1", 2),
        ("zero2", "zero2", 2),
        ("zero3", "zero3", 2),
    ],
)
def test_the_launchers_files_are_understood(name, engine, world, monkeypatch):
    monkeypatch.chdir(ACCELERATE.parents[1])  # where their own paths begin
    launch = from_file(ACCELERATE / f"{name}.yaml", None)
    assert (launch.engine, launch.world) == (engine, world)
    assert from_file(ACCELERATE / f"{name}.yaml", 4).world == 4


@pytest.mark.fast
def test_options_that_contradict_each_other_are_refused():
    assert from_options(None, None).engine == "plain"
    assert from_options(None, 4).engine == "ddp"
    assert from_options("zero3", None).world == 2
    with pytest.raises(ConfigError, match="that is the engine ddp"):
        from_options("plain", 2)
    with pytest.raises(ConfigError, match="at least 1"):
        from_options(None, 0)
