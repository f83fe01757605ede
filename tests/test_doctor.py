"""`llmnorm doctor` really tries what it speaks of."""

import json

import pytest
import torch

from llmnorm import doctor
from llmnorm.cli import run_command
from llmnorm.errors import EnvironmentProblem


def state_of(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_a_sound_machine_passes_and_two_processes_meet(capsys, tmp_path):
    assert run_command(doctor, "llmnorm doctor", ["--json", "--dir", str(tmp_path)]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {one["state"] for one in found.values()} <= {"ok", "warning"}
    assert f"torch {torch.__version__}" in found["versions"]["text"]
    assert "processes by" in found["all-reduce"]["text"]
    assert str(tmp_path) in found["disk"]["text"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes seconds."""
    for check in ("_compiler", "_zero", "_all_reduce"):
        monkeypatch.setattr(doctor, check, lambda *_: (doctor.OK, "left out"))


@pytest.mark.fast
def test_a_check_that_fails_is_a_problem_and_the_others_still_run(quick, capsys, tmp_path):
    with pytest.raises(EnvironmentProblem, match="see disk"):
        run_command(doctor, "llmnorm doctor", ["--dir", str(tmp_path / "none")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert [line.split()[1] for line in lines if line.startswith("problem")] == ["disk"]


@pytest.mark.fast
def test_an_old_package_is_a_problem_with_its_remedy(quick, monkeypatch, tmp_path):
    monkeypatch.setitem(doctor._FLOORS, "torch", (99, 0))
    found = state_of(doctor.examine(tmp_path), "versions")
    assert found.state == doctor.PROBLEM
    assert found.text.endswith("pip install 'torch>=99.0'")


@pytest.mark.fast
def test_what_is_small_or_slow_is_a_warning(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SLOW_SYNC", 1e9)
    assert "saving will be slow" in state_of(doctor.examine(tmp_path), "disk").text
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 1e18)
    assert "make room" in state_of(doctor.examine(tmp_path), "disk").text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    assert state_of(doctor.examine(tmp_path), "threads").state == doctor.WARNING


def test_processes_that_fail_or_never_meet_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "_EXCHANGE", "raise SystemExit('no network')")
    assert doctor._all_reduce() == (doctor.PROBLEM, "gloo, rank 0: no network")
    monkeypatch.setattr(doctor, "_PATIENCE", 1)
    monkeypatch.setattr(doctor, "_EXCHANGE", "import time; time.sleep(60)")
    state, text = doctor._all_reduce()
    assert state == doctor.PROBLEM
    assert "within 1 s" in text
