"""The `llmnorm` command: dispatch, exit codes, one line for each error, quiet endings."""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from llmnorm import cli
from llmnorm.config import add_run_file
from llmnorm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
)
from llmnorm.modeling.operations import list_norms
from llmnorm.placements import list_placements
from llmnorm.resources import list_presets

COMMANDS = ["data", "train", "eval", "generate", "compare", "list", "verify", "validate", "doctor"]
Result = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., Result]:
    """Run a main function (default: the llmnorm command) in this process: code, stdout, stderr."""
    ours = logging.getLogger("llmnorm")
    before = (ours.handlers, ours.propagate, ours.level)

    def run(*words: str, main: Callable[[list[str]], int | None] | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmnorm", *words])
        with pytest.raises(SystemExit) as ended:
            cli.run_main(main) if main else cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    yield run
    ours.handlers, ours.propagate, ours.level = before


@pytest.mark.fast
@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_help_names_every_command(call, words):
    code, out, _ = call(*words)
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command}" in out


@pytest.mark.fast
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: llmnorm {command}")


@pytest.mark.fast
def test_help_of_commands_with_a_run_file_lists_its_keys(call):
    for command in ("train", "validate"):
        _, out, _ = call(command, "--help")
        assert "--training.global_batch_size\n" in out
        assert "sequences in one optimizer step" in out


@pytest.mark.fast
def test_an_unknown_command_suggests_the_nearest(call):
    code, out, err = call("trian")
    assert (code, out) == (2, "")
    assert err == "no command is named 'trian'; did you mean train?\n"


@pytest.mark.fast
def test_list_names_what_is_registered(call):
    for what, names in (("norms", list_norms()), ("placements", list_placements())):
        code, out, _ = call("list", what)
        assert code == 0
        assert all(f" {name} " in out for name in names)


@pytest.mark.fast
def test_list_presets_shows_parameter_counts(call):
    code, out, _ = call("list", "presets")
    assert code == 0
    assert all(f" {name} " in out for name in list_presets())
    assert " 134.11 M " in out  # 130m


@pytest.mark.fast
def test_validate_prints_the_resolved_run_file(call):
    code, out, err = call("validate", "quickstart", "--resolve", "--optimizer.lr", "1e-2")
    assert (code, err) == (0, "")
    assert "  lr: 0.01\n" in out
    assert "  final_lr_fraction: 0.1\n" in out


@pytest.mark.fast
@pytest.mark.parametrize(
    "words", [["quickstart"], ["--config", "quickstart"], ["--config=quickstart"]]
)
def test_the_run_file_comes_by_position_or_as_a_flag(call, words):
    assert call("validate", "--resolve", *words)[0] == 0
    assert call("validate", "--resolve", "--training.seed", "3", *words)[0] == 0


@pytest.mark.fast
def test_validate_reports_every_error_in_one_line_each(call):
    code, out, err = call("validate", "quickstart", "--lr", "3", "--data.seq_len", "x", "--seed=1")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "--data.seq_len: expected a whole number, found 'x'",
        "--lr is not a key of a run file; did you mean optimizer.lr?",
        "--seed is not a key of a run file; did you mean training.seed?",
    ]


@pytest.mark.fast
def test_a_command_without_a_run_file_refuses_overrides(call):
    code, _, err = call("list", "norms", "--optimizer.lr", "3")
    assert code == 2
    assert "unrecognized arguments: --optimizer.lr 3" in err


@pytest.mark.fast
@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (EnvironmentProblem, 3), (DataError, 4), (CheckpointError, 5)],
)
def test_our_errors_print_their_message_alone_and_give_their_code(call, error, code):
    def main(words):
        raise error("tokens-00000.npy: 3 bytes missing")

    assert call(main=main) == (code, "", "tokens-00000.npy: 3 bytes missing\n")


@pytest.mark.fast
def test_debug_adds_the_traceback_and_is_not_passed_on(call):
    def main(words):
        raise ConfigError(f"words {words}")

    code, _, err = call("a", "--debug", main=main)
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("words ['a']\n")


@pytest.mark.fast
def test_an_error_cannot_forge_lines_or_colours(call):
    def main(words):
        raise DataError("file \x1b[31m\r" + "x" * 1000)

    _, _, err = call(main=main)
    assert len(err) <= 301
    assert err.startswith("file \\x1b[31m\\rxxx")


@pytest.mark.fast
def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch):
    def main(words):
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["llmnorm"])
    with pytest.raises(KeyError):
        cli.run_main(main)


@pytest.mark.fast
def test_other_ranks_let_rank_0_speak_first(call, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")

    def main(words):
        logging.getLogger("llmnorm.test").warning("said by rank 0 alone")
        raise DataError("broken here only")

    assert call(main=main) == (4, "", "[rank 3] broken here only\n")
    assert waited


@pytest.mark.fast
def test_notices_go_to_standard_error_with_their_level(call):
    def main(words):
        logging.getLogger("llmnorm.test").info("continuing step 3")
        logging.getLogger("llmnorm.test").warning("warm-up is shortened")
        return 75

    assert call(main=main) == (75, "", "continuing step 3\nwarning: warm-up is shortened\n")


@pytest.mark.fast
def test_a_script_hands_its_words_to_a_command():
    seen = {}

    def run(args):
        seen.update(vars(args))

    command = SimpleNamespace(__doc__="Do it.", add_arguments=add_run_file, run=run)
    words = ["--config", "x.yaml", "--optimizer.lr", "1e-3", "--training.seed=2"]
    assert cli.run_command(command, "train/pretrain.py", words) == 0
    assert seen == {
        "config": "x.yaml",
        "overrides": ["--optimizer.lr", "1e-3", "--training.seed=2"],
    }


def python(*words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True)


def test_python_m_llmnorm_is_the_command():
    with python("-m", "llmnorm", "--version") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "llmnorm 0.1.0\n", "")


def test_a_closed_pipe_ends_the_command_quietly():
    with python("-m", "llmnorm", "validate", "quickstart", "--resolve") as process:
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_ctrl_c_ends_the_command_quietly():
    code = """
import signal, time
from llmnorm.cli import run_main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def main(words):
    print("ready", flush=True)
    time.sleep(60)
run_main(main)
"""
    with python("-c", code) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
