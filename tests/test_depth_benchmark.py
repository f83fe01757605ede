"""What benchmarks/depth.py keeps of a run is JSON, also of one that diverged."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ENTROPY = 5.0


@pytest.fixture
def scripts(monkeypatch):
    """depth.py and depth_figure.py as modules."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("depth", "depth_figure")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def run_of(losses: list[float | None], folder: Path) -> Path:
    """A run directory with these losses."""
    folder.mkdir()
    lines = [
        json.dumps({"train/loss": loss, "grad_norm": i + 1.0}) for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "environment.json").write_text(json.dumps({"git_commit": "abc"}))
    return folder


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_a_run_that_diverged_is_null_in_json_and_last_in_the_picture(scripts, tmp_path, lost):
    depth, figure = scripts.depth, scripts.depth_figure
    stack = depth.STACKS[0]
    curves = {"lost": [7.0, 6.0, lost], "worse": [7.0] * 12, "better": [7.0] * 2 + [4.0] * 10}
    rows = {
        name: depth.measured(stack, run_of(losses, tmp_path / name), ENTROPY)
        for name, losses in curves.items()
    }
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows["lost"]["losses"] == [7.0, 6.0, None]
    assert (rows["lost"]["last_loss"], rows["lost"]["learns"]) == (None, False)
    assert [row["last_loss"] for row in figure.ranked(list(rows.values()))] == [4.0, 7.0, None]
    assert figure.label(rows["lost"]) == "diverged  post_ln"
    figure.draw(rows, ENTROPY, depth.WINDOW, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 0


def test_a_run_learns_if_the_mean_of_its_last_steps_is_below_the_entropy(scripts, tmp_path):
    depth = scripts.depth
    for name, last, learns in (("below", ENTROPY - 0.01, True), ("above", ENTROPY + 0.01, False)):
        losses = [9.0] * 20 + [last] * depth.WINDOW
        row = depth.measured(depth.STACKS[0], run_of(losses, tmp_path / name), ENTROPY)
        assert row["last_loss"] == pytest.approx(last)
        assert row["learns"] is learns
        assert (row["first_loss"], row["steps"], row["layers"]) == (9.0, 30, 200)
        assert row["falls"]
        assert row["largest_grad_norm"] == 30.0
