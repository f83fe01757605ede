"""A comparison shows each run's own numbers and says what besides the scheme differs."""

import json
import math

import pytest
from matplotlib.image import imread

from llmnorm.errors import ConfigError, DataError
from llmnorm.evaluation import records
from llmnorm.evaluation.compare import CAVEAT, as_json, compare, differences, markdown, plain
from llmnorm.evaluation.curves import draw_losses, smoothed
from llmnorm.evaluation.runs import open_run

pytestmark = pytest.mark.fast

SCORE = {
    "perplexity": 7.389,
    "bits_per_byte": 1.25,
    "loss": 2.0,
    "tokens": 100,
    "seq_len": 32,
    "stride": 32,
    "split": "val",
    "dtype": "float32",
    "data_fingerprint": "a" * 64,
    "max_documents": None,
}
TASK = {"acc": 0.41, "acc_stderr": 0.03, "chance": 0.25, "higher_is_better": {"acc": True}}


@pytest.fixture
def two_runs(make_run, model_folder):
    """Two finished runs of different schemes, equal in everything else."""
    runs = []
    for placement, norm in (("pre_ln", "rmsnorm"), ("lns", "derf")):
        run = make_run(
            placement,
            placement=placement,
            norm=norm,
            validation={1: 4.5, 3: 3.1234},
            model=model_folder,
        )
        records.write(SCORE, name="perplexity-some-val", run=run, out=None)
        records.write({"tasks": {"ours": TASK}}, name="harness-ours", run=run, out=None)
        runs.append(run)
    return runs


def test_a_row_holds_the_runs_own_numbers(two_runs):
    comparison = compare([open_run(run) for run in two_runs])
    row = dict(zip(comparison.columns, comparison.rows[0], strict=True))
    assert row == {
        "scheme": "pre_ln + rmsnorm",
        "validation loss": "2.0000",
        "perplexity": "7.389",
        "bits per byte": "1.2500",
        "ours (acc, chance 0.250)": "0.410 ± 0.030",
        "tokens/s": "1,002",
        "parameters": "13,424",
    }


def test_parameters_are_those_of_the_model(two_runs, model_folder):
    from llmnorm.evaluation.loading import load

    model = load(str(model_folder)).model
    assert open_run(two_runs[0]).parameters == sum(p.numel() for p in model.parameters())


def test_equal_runs_have_nothing_to_say_but_the_caveat(two_runs):
    comparison = compare([open_run(run) for run in two_runs])
    assert comparison.notes == [CAVEAT]
    assert "not a ranking" in CAVEAT
    for text in (markdown(comparison), plain(comparison)):
        assert CAVEAT in text


def test_other_data_other_tokens_and_other_settings_are_named_first_to_last(make_run):
    first = make_run("first", seed=0)
    second = make_run("second", seed=1, tokens_per_step=1024, fingerprint="c" * 64)
    lines = differences([open_run(first), open_run(second)])
    assert [line.partition(":")[0] for line in lines] == [
        "Besides the scheme, the training data differs",
        "Besides the scheme, tokens trained on differs",
        "Besides the scheme, training.seed differs",
    ]
    assert "first 1536; second 3072" in lines[1]


def test_scores_on_other_text_are_named(two_runs):
    for own in two_runs[1].glob("eval/perplexity*"):
        own.unlink()
    other = {**SCORE, "data_fingerprint": "d" * 64, "stride": 16}
    records.write(other, name="perplexity-other", run=two_runs[1], out=None)
    lines = differences([open_run(run) for run in two_runs])
    assert [line.partition(" differs")[0] for line in lines] == [
        "Besides the scheme, the data of the perplexity",
        "Besides the scheme, the stride of the perplexity",
    ]


def test_the_validation_split_comes_before_other_text_and_a_part_of_it(two_runs):
    run = two_runs[0]
    for name, other in (("b", {"data_fingerprint": "b" * 64}), ("c", {"max_documents": 2})):
        record = {**SCORE, "loss": 9.0, **other}
        records.write(record, name=f"perplexity-{name}", run=run, out=None)
    assert open_run(run).perplexity == SCORE
    (run / "eval" / "perplexity-some-val.json").unlink()
    assert open_run(run).perplexity["loss"] == 9.0
    assert open_run(run).validation_loss == 3.1234  # of training's last evaluation


def test_an_unfinished_run_and_a_run_without_scores_are_marked(make_run, model_folder):
    unfinished = make_run("unfinished", placement="lns")
    unscored = make_run("unscored", model=model_folder)
    comparison = compare([open_run(unfinished), open_run(unscored)])
    assert comparison.rows[0][2] == comparison.rows[1][2] == "-"
    assert any("unfinished is unfinished: step 3, 1,536 tokens" in n for n in comparison.notes)
    assert any("unscored has no perplexity yet" in note for note in comparison.notes)


def test_two_runs_of_one_scheme_are_told_apart_by_their_folder(make_run):
    runs = [open_run(make_run(name)) for name in ("first", "second")]
    comparison = compare(runs)
    assert comparison.columns[0] == "run"
    assert [row[0] for row in comparison.rows] == [str(run.path) for run in runs]


def test_json_holds_full_precision(two_runs):
    found = json.loads(as_json(compare([open_run(run) for run in two_runs])))
    assert found["runs"][1]["scheme"] == "lns + derf"
    assert found["runs"][1]["validation_loss"] == 2.0
    assert found["runs"][1]["downstream"]["ours"]["chance"] == 0.25


def test_a_line_that_a_kill_left_unfinished_is_dropped_and_a_damaged_one_is_not(make_run):
    run = make_run("run")
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 4, "tok')
    assert open_run(run).steps == 3
    log.write_text("not json\n" + whole)
    with pytest.raises(DataError, match="line 1 is not a record"):
        open_run(run)


def test_a_folder_that_is_no_run_and_an_empty_run_are_explained(make_run, tmp_path):
    with pytest.raises(ConfigError, match="is not a run"):
        open_run(tmp_path)
    run = make_run("run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="logged nothing yet"):
        open_run(run)


def test_records_are_never_overwritten_by_others(tmp_path):
    better = {**SCORE, "loss": 1.5}
    first = records.write(SCORE, name="perplexity-x", run=tmp_path, out=None)
    same = records.write(SCORE, name="perplexity-x", run=tmp_path, out=None)
    other = records.write(better, name="perplexity-x", run=tmp_path, out=None)
    assert first == same != other
    assert records.read(tmp_path, "perplexity") == [SCORE, better]


@pytest.mark.parametrize("text", ['{"loss": 2.', "[1]"])
def test_a_damaged_record_is_named(make_run, text):
    run = make_run("run")
    (run / "eval" / "perplexity-x.json").write_text(text)
    with pytest.raises(DataError, match="perplexity-x"):
        compare([open_run(run)])


def test_numbers_that_are_not_finite_are_null_in_json():
    assert json.loads(records.to_json({"a": math.nan, "b": [math.inf, 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }


def test_smoothing_averages_a_centred_window():
    curve = [(step, float(step % 2)) for step in range(100)]
    smooth = smoothed(curve, share=0.04)  # two points on each side
    assert [tokens for tokens, _ in smooth] == list(range(100))
    assert smooth[50] == (50, pytest.approx(2 / 5))
    assert smooth[99] == (99, pytest.approx(2 / 3))
    broken = [(0, 1.0), (1, math.nan), (2, 3.0)]
    assert smoothed(broken, share=0.7)[1] == (1, 2.0)


def test_the_picture_is_drawn(two_runs, tmp_path):
    file = draw_losses([open_run(run) for run in two_runs], tmp_path / "a" / "losses.png")
    assert imread(file).shape[:2] == (660, 1080)


METRICS = b'{"step": 1, "tokens": 8, "train/loss": 2.0}\n'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", b"a: 1", "has no model.norm.op"),
        ("config.yaml", b"\xff\xfe", "config.yaml cannot be read"),
        ("metrics.jsonl", b"\xff\n" + METRICS, "metrics.jsonl cannot be read"),
        ("environment.json", b'{"data": null}', "data is no object"),
        ("eval/perplexity-x.json", b"{}", "lacks loss"),
        ("eval/perplexity-x.json", b"\xff", "cannot be read as JSON"),
        ("eval/harness-x.json", b"{}", "lacks tasks"),
        ("eval/harness-x.json", b'{"tasks": {"a": 1}}', "lacks tasks.a.higher_is_better"),
        ("final/model.safetensors", b"damaged", "model.safetensors cannot be read"),
    ],
)
def test_a_damaged_or_foreign_run_is_refused_by_the_files_name(make_run, file, content, message):
    run = make_run("run")
    (run / "final").mkdir()
    (run / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        compare([open_run(run)])
    assert "\n" not in str(caught.value)


def test_a_run_without_speeds_is_compared_without_them(make_run):
    run = make_run("run")
    (run / "metrics.jsonl").write_bytes(METRICS)
    assert open_run(run).tokens_per_second is None
    assert compare([open_run(run)]).rows
