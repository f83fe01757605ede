"""metrics.jsonl is strict JSON whose floats read back equal."""

import io
import json
import math
import resource
import signal
from pathlib import Path

import pytest
from rich.console import Console

from llmnorm.errors import EnvironmentProblem
from llmnorm.training import metrics
from llmnorm.training.metrics import Display, MetricsFile, Reporter, open_trackers

pytestmark = pytest.mark.fast

RECORD = {
    "step": 10,
    "train/loss": 1 / 3,
    "lr": 1e-3,
    "grad_norm": 0.1 + 0.2,
    "perf/tokens_per_second": 1234.5,
    "perf/mfu": 0.25,
    "perf/memory_gib": 1.5,
    "perf/eta_seconds": 3725.0,
}


def test_floats_read_back_equal_and_nan_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", completed=0)
    file.write({**RECORD, "val/loss": math.nan})
    file.close()
    read = json.loads((tmp_path / "m.jsonl").read_text())
    assert {key: read[key] for key in RECORD} == RECORD
    assert read["val/loss"] is None


def test_lines_that_a_full_disk_refuses_wait_for_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    file, real = MetricsFile(path, completed=0), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, real[1]))
    try:
        for step in range(20):
            file.write({"step": step})
        with pytest.raises(OSError, match="File too large"):
            file.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, real)
        signal.signal(signal.SIGXFSZ, before)
    assert len(path.read_bytes()) == 100
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    file.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(20)]
    file.close()


def test_records_beyond_the_checkpoint_and_broken_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 8)]
    path.write_text("".join(lines[:3]) + "garbage\n" + "".join(lines[3:]) + '{"step": 5')
    MetricsFile(path, completed=5).close()
    assert path.read_text() == "".join(lines[:5])


def test_without_a_terminal_one_line_is_logged_every_interval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    display = Display(steps=40, completed=0, interval=20)
    with caplog.at_level("INFO"):
        for step in range(1, 41):
            display.show({**RECORD, "step": step})
    display.close()
    shown = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in shown] == ["1/40", "20/40", "40/40"]
    assert "loss 0.3333" in shown[0]
    assert "mfu 25%" in shown[0]
    assert shown[0].endswith("eta 1:02:05")


def test_a_terminal_gets_a_bar_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(metrics, "Console", lambda **_: console)
    display = Display(steps=40, completed=10, interval=20)
    display.show({**RECORD, "step": 11})
    display.close()
    assert "11/40" in screen.getvalue()
    assert "1,234 tok/s" in screen.getvalue()


def test_a_tracker_without_its_package_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(EnvironmentProblem, match=r"wandb, whose package is missing.*pip install"):
        open_trackers(["wandb"], tmp_path, {})


def test_a_tracker_that_does_not_start_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoLogin:
        requires_logging_directory = False

        def __init__(self, name: str) -> None:
            raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(metrics.LOGGER_TYPE_TO_CLASS, "wandb", NoLogin)
    with pytest.raises(EnvironmentProblem, match=r"wandb.*: api_key not configured \(no-tty\);"):
        open_trackers(["wandb"], tmp_path, {})


def test_tensorboard_gets_the_numbers_through_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tracker,) = open_trackers(["tensorboard"], tmp_path / "run", {"optimizer.lr": 0.1})
    tracker.log({"train/loss": 1.5}, step=1)
    tracker.finish()
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents*"))


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged, display = [], Display(steps=9, completed=0, interval=100)

    class Tracker:
        name = "remote"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append(step)
            raise ConnectionError("no route to host")

        def finish(self) -> None:
            raise AssertionError("it was dropped")

    file = MetricsFile(tmp_path / "metrics.jsonl", completed=0)
    reporter = Reporter(file, display, [Tracker()])
    for step in (2, 3):
        reporter.report({"step": step, "train/loss": 1.0})
    reporter.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert logged == [2]
    assert "tracker remote failed" in caplog.text
    assert "no route to host" in caplog.text
