"""`llmnorm validate`: what it checks, what it says, how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmnorm.cli import run_command
from llmnorm.config import load_run_config
from llmnorm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    LlmNormError,
)
from llmnorm.planning import command, forecast, machine
from llmnorm.planning.launcher import from_file, from_options
from llmnorm.training.engines import choose_engine
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


def mutated(folder: Path, name: str, zero: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a shipped launcher's file with changes, those of `zero` in a DeepSpeed file beside."""
    settings = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    if zero is not None:
        shipped = json.loads((ACCELERATE.parent / "deepspeed" / f"{name}.json").read_text())
        stages = shipped.pop("zero_optimization") | zero.pop("zero_optimization", {})
        (folder / "zero.json").write_text(
            json.dumps(shipped | {"zero_optimization": stages} | zero)
        )
        changes["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero.json")}
    for key, value in changes.items():
        merged = isinstance(value, dict) and key in settings
        settings[key] = settings[key] | value if merged else value
    (folder / "launcher.yaml").write_text(yaml.safe_dump(settings))
    return folder / "launcher.yaml"


def said(call: Callable[..., object], *arguments: object) -> tuple[int, str]:
    """Return exit code and line of a refusal."""
    with pytest.raises(LlmNormError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return raised.value.exit_code, str(raised.value)


@pytest.fixture
def asked_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Let accelerate launch with a file; instead of ranks, this process asks for its engine."""
    from accelerate.commands import launch

    monkeypatch.setattr("torch.distributed.run.run", lambda args: choose_engine())
    return lambda file: launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    )


STAGE_2 = {"deepspeed_config_file": None, "zero_stage": 2}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("fsdp2", {"fsdp_config": {"fsdp_version": 1}}, "FSDP version 1"),
        ("fsdp2", {"fsdp_config": {"fsdp_offload_params": True}}, "offload of parameters"),
        ("fsdp2", {"fsdp_config": {"fsdp_activation_checkpointing": True}}, "recomputation is"),
        ("ddp", {"distributed_type": "MEGATRON_LM"}, "asked for Megatron-LM"),
        ("zero2", {"deepspeed_config": STAGE_2 | {"offload_optimizer_device": "nvme"}}, "offload_"),
        (
            "zero3",
            {"zero": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "offload_",
        ),
        ("zero2", {"zero": {"zero_optimization": {"stage": 0}}}, "stage is 0"),
        ("zero1", {"zero": {"scheduler": {"type": "WarmupLR"}}}, "scheduler is refused"),
        ("zero1", {"deepspeed_config": {"deepspeed_config_file": "none.json"}}, "is not there"),
    ],
)
def test_a_launch_is_refused_in_the_engines_own_words(
    name, changes, named, tmp_path, asked_by_accelerate, words
):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    file = mutated(tmp_path, name, **changes)
    arguments = ["--accelerate", str(file), *words()]
    code, line = said(run_command, command, "llmnorm validate", arguments)
    assert (code, line) == said(asked_by_accelerate, file)
    assert named in line


@pytest.mark.fast
def test_what_accelerate_itself_refuses_is_one_line(tmp_path):
    file = mutated(tmp_path, "ddp", gpus="all")
    with pytest.raises(ConfigError, match=r"accelerate cannot launch with it: .*unknown keys"):
        from_file(file, None)


ODD = """
import torch

class Normalized(torch.optim.SGD):  # divides by the length of a whole tensor
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(parameter.grad.norm())
        super().step()

class Remembering(torch.optim.SGD):  # no checkpoint holds a list
    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["lengths"] = [1.0]

class Closing(torch.optim.SGD):
    def step(self, closure):
        super().step(closure)

class Reading(torch.optim.SGD):  # a run may well do this
    def step(self):
        if float(self.param_groups[0]["params"][0].grad.norm()) > 0:
            super().step()

class Searching(torch.optim.SGD):
    def step(self):
        assert self.param_groups[0]["params"][0].nonzero().shape[0] >= 0
        super().step()
"""
REFUSED_BY_ZERO: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model__overrides": {"weights": {"kind": "lawn", "free_steps": 1}}}, {}),
    ({"optimizer__name": "torch.optim:Adagrad"}, {}),
    ({"optimizer__name": "odd:Normalized"}, {}),
    ({"optimizer__name": "odd:Remembering"}, {}),
    ({"optimizer__name": "odd:Closing"}, {}),
    ({}, {"torch_autocast": {"enabled": True}}),
    ({}, {"train_batch_size": 4}),
    ({}, {"gradient_clipping": 0.5}),
    ({"training__micro_batch_size": 2}, {"gradient_accumulation_steps": 2}),
]
ZERO_WORKER = """
import json, os, sys

import deepspeed  # once, before the forks

from llmnorm.config import load_run_config
from llmnorm.errors import LlmNormError
from llmnorm.training.engines import choose_engine
from llmnorm.training.loop import train

sys.path.insert(0, sys.argv[1])
for file, words in json.loads(sys.argv[2]):
    if os.fork() == 0:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file
        try:
            train(load_run_config(None, words))
        except LlmNormError as error:
            print("SAID", json.dumps([error.exit_code, str(error)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the optimizers of `ODD` importable."""
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("odd")
def test_model_optimizer_and_settings_are_refused_as_zero_refuses_them(words, tmp_path, run_ranks):
    pytest.importorskip("deepspeed")
    refusals, cases = [], []
    for number, (changes, zero) in enumerate(REFUSED_BY_ZERO):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = mutated(folder, "zero2", dict(zero), num_processes=1)
        overrides = words(output__dir=str(folder / "run"), **changes)
        arguments = ["--accelerate", str(file), *overrides]
        refusals.append(said(run_command, command, "llmnorm validate", arguments))
        cases.append((str(folder / "zero.json"), overrides))
    script = tmp_path / "worker.py"
    script.write_text(ZERO_WORKER)
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    given = [script, tmp_path, json.dumps(cases)]
    output = run_ranks(*given, world=1, timeout=200, **launched)[0]
    lines = [line.removeprefix("SAID ") for line in output.splitlines() if line.startswith("SAID")]
    assert [tuple(json.loads(line)) for line in lines] == refusals


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    "name", ["odd:Remembering", "odd:Closing", "torch.optim:SparseAdam", "torch.optim:LBFGS"]
)
def test_an_optimizer_is_refused_as_the_run_refuses_it(name, words):
    arguments = words(optimizer__name=name)
    code, line = said(run_command, command, "llmnorm validate", arguments)
    assert (code, line) == said(train, load_run_config(None, arguments))


@pytest.mark.usefixtures("odd")
def test_an_optimizer_that_looks_at_values_is_followed_where_it_can_be(validate):
    assert validate(optimizer__name="odd:Reading")["memory"]["engines"]["plain"]["fits"]
    with pytest.raises(EnvironmentProblem, match="memory of Searching cannot be found"):
        validate(optimizer__name="odd:Searching")


def test_an_engine_that_is_not_asked_for_may_refuse(validate):
    engines = validate("--processes", "2", optimizer__name="torch.optim:Adagrad")["memory"][
        "engines"
    ]
    assert "rebuilds Adagrad" in engines["zero2"]["refused"]
    assert engines["ddp"]["fits"]
