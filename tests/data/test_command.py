"""`llmnorm data` from the command line: every source, one-line errors and their exit codes."""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llmnorm.data import Prepared, open_prepared
from llmnorm.data.command import SOURCES, add_arguments, run
from llmnorm.errors import ConfigError

from .conftest import make_documents

pytestmark = pytest.mark.fast


def data(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def write_inputs(folder: Path, prepared: Prepared) -> dict[str, list[object]]:
    """The same documents in every form: source -> further arguments."""
    documents = make_documents(40, seed=9)
    rows = "".join(json.dumps({"body": text}) + "\n" for text in documents)
    (folder / "a.jsonl").write_text(rows)
    (folder / "a.txt").write_text("\n\n".join(documents))
    pyarrow.parquet.write_table(pyarrow.table({"body": documents}), folder / "a.parquet")
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text(rows)
    tokenizer = prepared.tokenizer()
    tokens = [token for text in documents for token in [*tokenizer(text).input_ids, 0]]
    np.array(tokens, "<u2").tofile(folder / "a.bin")
    np.array(tokens, "<u4").tofile(folder / "a.npy")
    return {
        "text": ["--path", folder / "a.txt"],
        "jsonl": ["--path", folder / "a.jsonl", "--text-column", "body"],
        "parquet": ["--path", folder / "a.parquet", "--text-column", "body"],
        "hf": ["--path", folder / "set", "--text-column", "body", "--streaming"],
        "nanogpt": ["--path", folder / "a.bin"],
        "olmo": ["--path", folder / "a.npy", "--token-dtype", "uint32"],
    }


def test_every_form_of_the_same_documents_gives_the_same_tokens(
    tmp_path: Path, prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for source, words in write_inputs(tmp_path, prepared).items():
        out = tmp_path / "out" / source
        common = ["--tokenizer", prepared.path, "--val-fraction", 0.2, "--out", out]
        assert data("prepare", "--source", source, *words, *common) == 0
        assert f"{out}: " in capsys.readouterr().out
        splits = [open_prepared(out).split(name) for name in ("train", "val")]
        found.append([(s.window(0, s.tokens).tolist(), s.utf8_bytes) for s in splits])
    assert len(found) == 6
    assert all(one == found[0] for one in found)


def test_a_task_is_written_while_preparing_or_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(make_documents(60, words=150)))
    words = ["--source", "text", "--path", path, "--vocab-size", 300, "--val-fraction", 0.3]
    assert data("prepare", *words, "--out", tmp_path / "out", "--write-task") == 0
    assert "lm-eval task a_continuation" in capsys.readouterr().out
    assert (tmp_path / "out" / "tasks" / "a_continuation.yaml").is_file()
    assert data("task", tmp_path / "out", "--items", 7) == 0
    rows = (tmp_path / "out" / "tasks" / "a_continuation.jsonl").read_text()
    assert rows.count("\n") == 7
    open_prepared(tmp_path / "out")  # the task does not disturb the folder


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--source", "text"], "--source text needs --path"),
        (["--source", "python-stdlib", "--path", "x"], "--path means nothing with --source python"),
        (["--source", "text", "--path", "x", "--subset", "y"], "--subset means nothing"),
        (["--source", "hf", "--path", "x", "--glob", "y"], "--glob means nothing"),
        (["--source", "text", "--path", "x", "--streaming"], "--streaming means nothing"),
        (["--source", "nanogpt", "--path", "x"], "give the --tokenizer they were made with"),
        (["--source", "text", "--path", "x", "--val-fraction", "0"], "--val-fraction"),
        (["--source", "text", "--tokenizer", "x", "--vocab-size", "300"], "exclude each other"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as error:
        data("prepare", *words, "--out", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_sources_of_the_contract_are_there() -> None:
    assert set(SOURCES) == {
        *("python-stdlib", "text", "jsonl", "parquet", "hf"),
        *("nanogpt", "megatron", "olmo"),
    }
