"""The reliability harness judges rightly: it would be worthless if a bad trial passed."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from reliability import results, schedule
from reliability.harness import BARS, Bar, Trial, bar, choose
from reliability.results import Progress, Tally, write_table
from reliability.schedule import Run

pytestmark = pytest.mark.fast

TESTS = Path(__file__).parent
RunBars = Callable[..., Run]


def make(name: str, work: Callable[[Trial], Any], **options: Any) -> Bar:
    """A bar that is not registered."""
    values: dict[str, Any] = {"total": 1, "ci": 1, "seconds": 20, "prepare": None, **options}
    return Bar(id=name, what="a test", run=work, **values)


def passing(trial: Trial) -> None:
    trial.note("zero2")
    assert trial.folder.is_dir()
    assert not list(trial.folder.iterdir())


def failing(trial: Trial) -> None:
    (trial.folder / "kept").touch()
    raise AssertionError("seven is not eight\nat all")


def leaving(trial: Trial) -> None:
    sys.exit(0)


def skipping(trial: Trial) -> None:
    try:
        trial.skip("no such tool here")
    except Exception:  # must not swallow it
        return


def crashing(trial: Trial) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def vanishing(trial: Trial) -> None:
    os._exit(0)


def hanging(trial: Trial) -> None:
    sleep = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (trial.shared / "pid").write_text(str(sleep.pid))
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(1000)


def littering(trial: Trial) -> None:
    """Passes, and leaves an orphan in a session of its own that holds every pipe."""
    if os.fork() == 0:
        os.setsid()
        (trial.shared / "orphan").write_text(str(os.getpid()))
        time.sleep(1000)
    while not (trial.shared / "orphan").exists():
        time.sleep(0.001)


@pytest.fixture
def go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Run, str]]:
    """Run bars as the program does; returns exit code, run and what it printed."""
    monkeypatch.setattr(schedule, "ROOT", tmp_path)
    monkeypatch.setattr(schedule, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(schedule, "commit", lambda: ("abc+", "abc-1"))

    def run(*bars: Bar, tier: str = "ci", seed: int = 20261120) -> tuple[int, Run, str]:
        work = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
        made = Run(tier, seed, work, 2)
        return made.go(bars), made, capfd.readouterr().out

    return run


@pytest.mark.parametrize(
    ("work", "verdict", "detail"),
    [
        (passing, "passed", ""),
        (failing, "failed", "AssertionError: seven is not eight"),
        (leaving, "failed", "SystemExit: 0"),
        (skipping, "skipped", "no such tool here"),
        (crashing, "failed", "the trial's process ended by SIGKILL"),
        (vanishing, "failed", "the trial's process ended by exit code 0"),
    ],
)
def test_each_end_of_a_trial_gets_its_verdict(work, verdict, detail, go) -> None:
    code, run, text = go(make("Z1", work))
    (attempt,) = run.tallies["Z1"].attempts.values()
    assert (attempt["verdict"], attempt["detail"]) == (verdict, detail)
    assert code == (verdict == "failed")
    assert ("make replay TRIAL=Z1:0" in text) == (verdict == "failed")
    assert (run.work / "Z1" / "0").exists() == (verdict == "failed")
    assert attempt["notes"] == (["zero2"] if work is passing else [])


def test_a_hanging_trial_fails_and_nothing_of_it_is_left(tmp_path: Path, go) -> None:
    code, run, _ = go(make("Z1", hanging, seconds=0.5, prepare=lambda _: tmp_path))
    (attempt,) = run.tallies["Z1"].attempts.values()
    assert (code, attempt["detail"]) == (1, "not done after 0.5 s")
    assert attempt["seconds"] < 10
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_what_a_passed_trial_leaves_running_is_ended(tmp_path: Path, go) -> None:
    code, _, _ = go(make("Z1", littering, prepare=lambda _: tmp_path))
    assert code == 0
    assert not psutil.pid_exists(int((tmp_path / "orphan").read_text()))


def test_bars_share_a_preparation_and_count_what_they_ran(tmp_path: Path, go) -> None:
    def prepare(folder: Path) -> int:
        (folder / "made").touch()
        with (tmp_path / "prepared").open("a") as handle:
            handle.write("x")
        return 5

    def even(trial: Trial) -> None:
        trial.note("even" if trial.index % 2 == 0 else "odd")
        assert trial.total == trial.shared == 5

    options = {"prepare": prepare, "total": lambda shared: shared, "ci": 9}
    code, run, text = go(make("Z1", even, **options), make("Z2", even, **options))
    assert code == 0
    assert (tmp_path / "prepared").read_text() == "x"
    assert run.tallies["Z2"].ran == "even 3, odd 2"
    assert "Z2   a test: 5/5 passed" in text
    assert "[even 3, odd 2]" in text
    assert "10/10 trials passed, 0 skipped" in text


def test_a_failed_preparation_and_many_skips_fail_the_run(go) -> None:
    def prepare(folder: Path) -> None:
        raise OSError("no disk")

    code, _, text = go(make("Z1", passing, prepare=prepare), make("Z2", passing))
    assert code == 1
    assert "FAILED: Z1" in text
    assert "1/1 trials passed" in text
    code, _, text = go(make("Z1", skipping, total=21, ci=21))
    assert code == 1
    assert "21 trials skipped, more than 20" in text


def test_a_bar_without_trials_fails_the_run(go) -> None:
    code, _, text = go(make("Z1", passing, total=lambda shared: 0), make("Z2", passing))
    assert code == 1
    assert "FAILED: Z1" in text


def test_the_command_line_refuses_a_bar_that_is_not_there() -> None:
    command = [sys.executable, "-m", "reliability", "--trial", "Q9:1"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no bar is named Q9:1" in done.stderr


def test_make_replays_with_the_trial_and_seed_that_a_failure_names() -> None:
    command = ["make", "-n", "replay", "TRIAL=A1:17", "SEED=5"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert "reliability --seed 5 --trial A1:17" in done.stdout


def test_a_commit_chooses_trials_evenly_and_all_commits_choose_all() -> None:
    assert choose(7, 9, "any") == list(range(7))
    chosen = choose(100, 20, "one")
    assert chosen == choose(100, 20, "one")
    assert {b - a for a, b in itertools.pairwise(chosen)} == {5}
    seen = {index for commit in range(60) for index in choose(100, 20, f"{commit} Z1")}
    assert seen == set(range(100))
    assert len(set(choose(101, 100, "two"))) == 100
    assert choose(5, 0, "none") == []


def test_a_trial_draws_from_seed_bar_and_index(tmp_path: Path) -> None:
    draws = {
        Trial(name, index, 9, tmp_path, None, seed).rng.random()
        for name in ("Z1", "Z2")
        for index in (0, 1)
        for seed in (1, 2)
    }
    assert len(draws) == 8
    one, again = (Trial("Z1", 3, total, tmp_path, None) for total in (9, 4))
    assert one.rng.random() == again.rng.random()


def test_a_stopped_nightly_run_goes_on_and_a_finished_one_begins_again(tmp_path: Path, go) -> None:
    tried = tmp_path / "tried"

    def trial(trial: Trial) -> None:
        with tried.open("a") as handle:
            handle.write(f"{trial.index} ")

    progress = Progress(tmp_path / ".reliability", "abc-1-20261120")
    earlier = {"bar": "Z1", "verdict": "passed", "detail": "", "notes": [], "seconds": 1.0}
    for index in (0, 2):
        progress.add({**earlier, "index": index})
    with (progress.folder / "Z1.jsonl").open("a") as handle:
        handle.write('\n{"bar": "Z1", "ind')  # cut by a kill
    bar = make("Z1", trial, total=4)
    code, run, _ = go(bar, tier="nightly")
    assert (code, tried.read_text()) == (0, "1 3 ")
    assert run.tallies["Z1"].tried == 4
    tried.unlink()
    assert go(bar, tier="nightly")[0] == 0
    assert tried.read_text() == "0 1 2 3 "


def test_only_a_nightly_run_writes_the_table_and_other_rows_stay(tmp_path: Path, go) -> None:
    table = tmp_path / "RESULTS.md"
    go(make("Z1", passing))
    assert not table.exists()
    tallies = [Tally(make(name, passing), 0, True) for name in ("Z10", "Z2", "B1")]
    write_table(table, tallies, seed=7, commit="old")
    go(make("Z2", passing, total=3), tier="nightly")
    rows = [line for line in table.read_text().splitlines() if line[:3] in ("| Z", "| B")]
    assert [row.split(" ")[1] for row in rows] == ["B1", "Z2", "Z10"]
    assert rows[0] == "| B1 | a test | 0 | 0 | 0 |  | 0 | 7 | old |"
    assert rows[1].startswith("| Z2 | a test | 3 | 3 | 0 | zero2 3 |")
    assert rows[1].endswith("| 20261120 | abc+ |")


def test_a_bar_has_a_name_of_its_own() -> None:
    before = dict(BARS)
    for name in ("A", "a1", "A1 "):
        with pytest.raises(ValueError, match="no letter and number"):
            bar(name, "wrong", total=1, ci=1)(passing)
    bar("Z99", "right", total=1, ci=1)(passing)
    with pytest.raises(ValueError, match="taken"):
        bar("Z99", "again", total=1, ci=1)(passing)
    BARS.pop("Z99")
    assert before == BARS


def test_the_commit_is_that_of_the_checkout() -> None:
    shown, key = results.commit()
    assert key.startswith(shown.rstrip("+"))
