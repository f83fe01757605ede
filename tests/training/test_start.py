"""What a start takes from a directory that is not new, and what it refuses."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.config import RunConfig, load_run_config
from llmnorm.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from llmnorm.training.directory import RunDirectory
from llmnorm.training.loop import train
from llmnorm.training.ranks import Ranks

from .conftest import Killed, stop_after

Tiny = Callable[..., RunConfig]


def test_another_configuration_is_refused_with_the_differing_keys(tiny: Tiny) -> None:
    train(tiny(training__max_steps=2))
    other = tiny(training__max_steps=2, optimizer__lr=0.02, model__norm__op="layernorm")
    with pytest.raises(ConfigError, match=r"model\.norm\.op: .*optimizer\.lr: 0.01 became 0.02"):
        train(other)
    before = (other.output.dir / "config.yaml").read_bytes()
    free = tiny(training__max_steps=2, checkpoint__keep=5, log__interval_steps=1)
    assert train(free) == 0
    assert (other.output.dir / "config.yaml").read_bytes() == before  # of the run that was


def test_never_refuses_a_directory_that_holds_a_run(tiny: Tiny) -> None:
    assert train(tiny(training__max_steps=2, checkpoint__resume="never")) == 0
    with pytest.raises(ConfigError, match=r"checkpoint\.resume is never"):
        train(tiny(training__max_steps=2, checkpoint__resume="never"))


def test_files_of_others_with_our_names_are_refused(tiny: Tiny) -> None:
    config = tiny()
    (config.output.dir / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        train(config)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_start_that_failed_before_its_first_step_keeps_nothing(resume: str, tiny: Tiny) -> None:
    with pytest.raises(DataError):
        train(tiny(data__seq_len=100_000, training__micro_batch_size=1))
    config = tiny(training__max_steps=1, checkpoint__resume=resume)
    assert train(config) == 0
    assert load_run_config(config.output.dir / "config.yaml") == config
    facts = json.loads((config.output.dir / "environment.json").read_text())
    assert (facts["config_fingerprint"], facts["tokens"]) == (config.fingerprint(), 6 * 32)
    assert facts["restarts"] == []


def test_a_run_with_one_recorded_step_keeps_its_configuration(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(tiny())
    with pytest.raises(ConfigError, match="another configuration"):
        train(tiny(optimizer__lr=0.02))


def test_a_folder_of_prepared_data_or_of_a_model_is_refused(tiny: Tiny) -> None:
    config = tiny(training__max_steps=1)
    (config.output.dir / "eval").mkdir(parents=True)
    (config.output.dir / ".hidden").touch()
    foreign = config.output.dir / "manifest.json"
    foreign.touch()
    with pytest.raises(ConfigError, match=r"holds manifest\.json"):
        train(config)
    foreign.unlink()
    assert train(config) == 0


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"restarts": []}'])
def test_a_damaged_environment_file_is_named_and_made_again_when_removed(
    text: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(training__max_steps=4)
    stop_after(3, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    path = config.output.dir / "environment.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"environment\.json is damaged .*; remove it"):
        train(config)
    path.unlink()
    assert train(config) == 0
    assert json.loads(path.read_text())["config_fingerprint"] == config.fingerprint()


@pytest.mark.parametrize(
    ("name", "options", "seen"),
    [("adamw", {"amsgrad": 1}, "AdamW"), ("torch.optim:SparseAdam", {}, "SparseAdam")],
)
def test_an_optimizer_that_cannot_do_its_first_step_is_a_mistake_of_the_run_file(
    name: str, options: dict[str, Any], seen: str, tiny: Tiny
) -> None:
    with pytest.raises(ConfigError, match=rf"{seen} fails in its first step.*optimizer\.name"):
        train(tiny(optimizer__name=name, optimizer__options=options))


def test_two_runs_cannot_share_a_directory(tiny: Tiny) -> None:
    config = tiny()
    config.output.dir.mkdir(parents=True)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # another process holds the lock: POSIX locks belong to processes
        import fcntl

        handle = open(config.output.dir / ".lock", "a")  # noqa: SIM115 (held until the exit)
        fcntl.lockf(handle, fcntl.LOCK_EX)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(EnvironmentProblem, match="in use by another run"):
            train(config)
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)


def test_the_first_failure_of_a_start_is_the_one_recorded(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_exit(code=4, step=3, cause="the data", rank=1)
    directory.write_exit(code=1, step=3, cause="connection closed", rank=0)
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record == {"code": 4, "rank": 1, "step": 3, "cause": "the data"}


def test_other_data_under_the_same_path_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    stop_after(2, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    facts: Path = config.output.dir / "environment.json"
    record = json.loads(facts.read_text())
    record["data"]["fingerprint"] = "0" * 64
    facts.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="fingerprint 000000000000"):
        train(config)


def test_a_rank_that_sees_another_folder_is_named(tiny: Tiny) -> None:
    class TwoMachines(Ranks):
        def gather(self, value: bool) -> list[bool]:
            return [value, False]

    config = tiny()
    directory = RunDirectory(config.output.dir)
    with pytest.raises(EnvironmentProblem, match=r"rank 1 does not find .* all machines share"):
        directory.enter(config, TwoMachines(0, 1, torch.device("cpu")))
    directory.close()
