"""`llmnorm verify resume` says exact only where it is, and names what differs first."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from training.conftest import prepare_corpus, tiny_words

from llmnorm import verify
from llmnorm.cli import run_command
from llmnorm.config import load_run_config
from llmnorm.errors import ConfigError
from llmnorm.training.loop import train
from llmnorm.training.signals import STOPPED_BY_SIGNAL
from llmnorm.verify import Difference, RunFailed, difference

NOISY = """
import os
import torch

class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += 1e-3 * os.urandom(1)[0]
        return super().step(closure)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus")).path


def resume(*words: object) -> int:
    """`llmnorm verify resume WORDS`."""
    return run_command(verify, "llmnorm verify", ["resume", *map(str, words)])


@pytest.mark.slow
def test_a_run_that_continues_exactly_is_said_to(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    words = tiny_words(corpus, tmp_path / "run", training__max_steps=1000)
    launch = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2"
    assert resume("--launch", launch, "--steps", 5, "--dir", scratch, *words) == 0
    assert capsys.readouterr().out.startswith("exact: 5 steps straight on, and stopped at step 2")
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_does_not_repeat_itself_is_found_out(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "noisy_optimizer.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = tiny_words(corpus, tmp_path / "run", optimizer__name="noisy_optimizer:Noisy")
    assert resume("--steps", 4, *words, "--optimizer.lr", "0.1") == 1
    out = capsys.readouterr().out
    assert out.startswith("not exact: grad_norm of step 2 is ")
    assert "this is before the stop, so a run does not even repeat itself" in out
    (kept,) = tmp_path.glob("run.verify-*")
    assert str(kept) in out
    assert {path.name for path in kept.iterdir()} >= {"straight", "stopped", "straight.log"}


@pytest.fixture(scope="module")
def pair(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two equal runs of 4 steps, one stopped at step 2 by the key that `verify` uses."""
    folder = tmp_path_factory.mktemp("pair")
    for name, stops in (("one", [4]), ("other", [2, 4])):
        for stop in stops:
            changes = {"checkpoint__interval_steps": 0, "checkpoint__stop_at_step": stop}
            config = load_run_config(None, tiny_words(corpus, folder / name, **changes))
            assert train(config) == STOPPED_BY_SIGNAL
            left = json.loads((folder / name / "exit.json").read_text())
            assert (left["step"], left["cause"]) == (stop, "stopped by checkpoint.stop_at_step")
    return folder / "one", folder / "other"


def test_equal_runs_have_no_difference(pair: tuple[Path, Path]) -> None:
    assert difference(*pair, 4) is None


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("metrics.jsonl", '"tokens": 576', '"tokens": 577', "tokens of step 3"),
        ("checkpoints/step_00000004/state.json", '"step": 4', '"step": 5', "step in state.json"),
    ],
)
def test_the_first_difference_is_named(
    file: str, old: str, new: str, found: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(pair[1], tmp_path / "other")
    path = tmp_path / "other" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    seen = difference(pair[0], tmp_path / "other", 4)
    assert seen is not None
    assert found in seen.text


def test_a_flipped_bit_of_the_optimizer_is_named_by_its_tensor(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(pair[1], tmp_path / "other")
    (path,) = (tmp_path / "other").rglob("step_00000004/optimizer-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen = difference(pair[0], tmp_path / "other", 4)
    assert isinstance(seen, Difference)
    assert seen.step == 4
    assert "exp_avg" in seen.text or "number" in seen.text or ".step" in seen.text
    path.unlink()
    seen = difference(pair[0], tmp_path / "other", 4)
    assert seen is not None
    assert seen.text.startswith("the presence of a file in optimizer-")


def test_a_run_that_fails_gives_its_own_cause_and_code(corpus: Path, tmp_path: Path) -> None:
    words = tiny_words(corpus, tmp_path / "run", data__seq_len=10**6)
    with pytest.raises(
        RunFailed, match=r"the straight run did not reach step 8: .*seq_len"
    ) as seen:
        resume(*words)
    assert seen.value.exit_code in (2, 4)


@pytest.mark.fast
def test_wrong_words_are_refused(tmp_path: Path) -> None:
    words = ["quickstart", "--output.dir", tmp_path / "run", "--data.path", tmp_path]
    with pytest.raises(ConfigError, match="--steps 1: expected at least 2"):
        resume(*words, "--steps", 1)
    with pytest.raises(ConfigError, match="exclude each other"):
        resume(*words, "--launch", "torchrun", "--processes", 2)
    with pytest.raises(ConfigError, match="--launch: no-such-launcher cannot be run"):
        resume(*words, "--launch", "no-such-launcher --fast")
