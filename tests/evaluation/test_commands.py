"""The command lines: one JSON on stdout alone, records in the run, errors in one line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm.cli import run_command
from llmnorm.errors import ConfigError, DataError, EnvironmentProblem
from llmnorm.evaluation import command
from llmnorm.evaluation.commands import compare, generate, harness, perplexity
from llmnorm.evaluation.curves import draw_losses
from llmnorm.evaluation.runs import open_run

ROOT = Path(__file__).resolve().parents[2]

FIELDS = [
    "loss",
    "perplexity",
    "bits_per_byte",
    "tokens",
    "bytes",
    "documents",
    "seq_len",
    "stride",
    "dtype",
]

SCORE_TEXT = ["perplexity", "--model", "MODEL", "--data", "TEXT"]


def llmnorm(name: str, *words: object) -> int:
    own = {"generate": generate, "compare": compare}
    if name in own:
        return run_command(own[name], f"llmnorm {name}", [str(word) for word in words])
    return run_command(command, "llmnorm eval", [name, *map(str, words)])


def test_perplexity_prints_one_json_and_writes_it_to_the_run(
    make_run, model_folder, text_file, capsys
):
    run = make_run("run", model=model_folder)
    assert llmnorm("perplexity", "--model", run, "--data", text_file) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[: len(FIELDS)] == FIELDS
    assert (found["tokens"], found["bytes"], found["documents"]) == (45, 45, 3)
    assert (found["seq_len"], found["stride"], found["dtype"]) == (32, 32, "float32")
    assert json.loads((run / "eval" / "perplexity-some.txt.json").read_text()) == found


def test_perplexity_of_a_stock_model_goes_where_the_user_says(
    model_folder, text_file, tmp_path, capsys
):
    out = tmp_path / "new" / "score.json"
    words = ["perplexity", "--model", model_folder, "--data", text_file, "--out", out]
    llmnorm(*words, "--seq-len", 16, "--stride", 4, "--max-documents", 2)
    found = json.loads(capsys.readouterr().out)
    assert (found["seq_len"], found["stride"], found["documents"]) == (16, 4, 2)
    assert json.loads(out.read_text()) == found
    assert not (model_folder / "eval").exists()


def test_harness_prints_one_json_and_writes_it_to_the_run(
    make_run, model_folder, task_folder, capsys
):
    run = make_run("run", model=model_folder)
    llmnorm("harness", "--model", run, "--tasks", "ours", "--include-path", task_folder)
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["ours"]["chance"] == pytest.approx(0.95 / 3)
    assert found["seq_len"] == 32  # as trained
    assert {"lm_eval", "torch", "transformers"} <= set(found["versions"])
    assert json.loads((run / "eval" / "harness-ours.json").read_text()) == found


def test_generate_prints_prompt_and_continuation(model_folder, capsys):
    llmnorm("generate", model_folder, "-p", "hello", "--max-new-tokens", 5, "--temperature", 0)
    first = capsys.readouterr().out
    llmnorm("generate", model_folder, "-p", "hello", "--max-new-tokens", 5, "--top-k", 1)
    assert first.startswith("hello")
    assert first == capsys.readouterr().out


@pytest.mark.parametrize("form", ["table", "plain", "markdown", "json"])
def test_compare_prints_every_form_and_draws(make_run, tmp_path, capsys, form):
    runs = [make_run("a"), make_run("b", placement="lns")]
    picture = tmp_path / "losses.svg"
    llmnorm("compare", *runs, "--format", form, "--plot", picture)
    out = capsys.readouterr().out
    assert "lns + rmsnorm" in out
    assert "not a ranking" in out
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["compare", "absent"], ConfigError, "absent is not a run"),
        (["compare", "absent", "--plot", "x.doc"], ConfigError, "expected a name ending in .png"),
        (["perplexity", "--model", "./absent", "--data", "x"], ConfigError, "does not exist"),
        (["harness", "--model", "./absent", "--tasks", ","], ConfigError, "names no task"),
        (["perplexity", "--model", "MODEL", "--data", "absent"], DataError, "absent does not"),
        ([*SCORE_TEXT, "--seq-len", "0"], ConfigError, "seq-len"),
        ([*SCORE_TEXT, "--seq-len", "200"], ConfigError, "128 positions"),
        ([*SCORE_TEXT, "--dtype", "int8"], ConfigError, "dtype"),
    ],
)
def test_mistakes_are_explained(model_folder, text_file, words, error, message):
    real = {"MODEL": str(model_folder), "TEXT": str(text_file)}
    with pytest.raises(error, match=message):
        llmnorm(*[real.get(word, word) for word in words])


@pytest.mark.parametrize("out", ["TEXT/score.json", "."])
def test_a_place_that_takes_no_record_is_refused_before_scoring(model_folder, text_file, out):
    place = out.replace("TEXT", str(text_file))
    words = ["perplexity", "--model", model_folder, "--data", text_file, "--batch-size", 2]
    with pytest.raises(EnvironmentProblem, match="cannot be written; name a file"):
        llmnorm(*words, "--out", place)


def test_a_score_is_printed_though_its_file_fails(make_run, model_folder, text_file, capsys):
    run = make_run("run", model=model_folder)
    taken = run / "eval" / "perplexity-some.txt.json"
    taken.mkdir()
    with pytest.raises(EnvironmentProblem, match="the record cannot be written"):
        llmnorm("perplexity", "--model", run, "--data", text_file)
    assert json.loads(capsys.readouterr().out)["documents"] == 3


def test_a_picture_that_cannot_be_written_is_refused_in_one_line(make_run, text_file):
    run = make_run("run")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        llmnorm("compare", run, "--plot", text_file / "losses.png")
    with pytest.raises(EnvironmentProblem, match="the picture cannot be written"):
        draw_losses([open_run(run)], text_file / "losses.png")


def test_letters_that_stdout_lacks_are_replaced(model_folder, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    llmnorm("generate", model_folder, "-p", "café", "--max-new-tokens", 1, "--temperature", 0)
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"caf?")


@pytest.mark.parametrize(("module", "name"), [(perplexity, "perplexity"), (harness, "harness")])
def test_the_scripts_are_the_commands(module, name, capsys):
    script = ROOT / "eval" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 40
    with pytest.raises(SystemExit) as ended:
        run_command(module, f"eval/{name}.py", ["--help"])
    assert ended.value.code == 0
    assert "--batch-size" in capsys.readouterr().out


def test_the_script_keeps_stdout_clean_in_a_process_of_its_own(model_folder, text_file):
    """Libraries print to stdout while they are imported; a reader of the JSON must not see it."""
    script = ROOT / "eval" / "perplexity.py"
    done = subprocess.run(
        [sys.executable, script, "--model", model_folder, "--data", text_file],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["documents"] == 3
