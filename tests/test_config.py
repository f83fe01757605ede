"""The run file: strict, one line for each error, with origin and suggestion."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmnorm import build_config
from llmnorm.config import RunConfig, load_run_config, split_overrides
from llmnorm.config.arguments import describe_keys
from llmnorm.config.document import read_document
from llmnorm.config.problems import leaves
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

COMPLETE = {
    "model": {"preset": "debug"},
    "data": {"path": "data/text", "seq_len": 64},
    "optimizer": {"lr": 0.001},
    "training": {"max_steps": 10, "global_batch_size": 4},
    "output": {"dir": "runs/one"},
}


@pytest.fixture
def write(tmp_path: Path):
    """Write a run file and return its path."""

    def to_file(content: str | dict[str, Any]) -> Path:
        path = tmp_path / "run.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def flags(values: dict[str, dict[str, Any]]) -> list[str]:
    return [f"--{s}.{k}={v}" for s, section in values.items() for k, v in section.items()]


def errors(path: Path | str | None, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides or [])
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() and 0 < len(line) <= 300 for line in lines), lines
    return lines


def test_a_file_and_the_same_flags_give_the_same_run(write):
    assert load_run_config(write(COMPLETE)) == load_run_config(None, flags(COMPLETE))


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(write):
    run = load_run_config(write(COMPLETE), ["--optimizer.lr", "2e-3", "--training.seed=7"])
    assert run.optimizer.lr == 0.002
    assert run.training.seed == 7
    assert run.training.max_steps == 10
    assert run.optimizer.betas == [0.9, 0.95]


def test_the_documented_defaults_hold():
    run = load_run_config(None, flags(COMPLETE))
    assert run.model.norm.model_dump() == {"op": "rmsnorm"}
    assert run.model.placement.model_dump() == {"name": "pre_ln"}
    assert (run.optimizer.name, run.optimizer.weight_decay, run.optimizer.eps) == (
        "adamw",
        0.1,
        1e-8,
    )
    assert (run.schedule.name, run.schedule.warmup_steps) == ("cosine", 0.05)
    assert (run.schedule.final_lr_fraction, run.schedule.decay_steps) == (0.1, None)
    assert (run.training.precision, run.training.compile) == ("auto", "auto")
    assert (run.training.clip_norm, run.training.seed) == (1.0, 0)
    assert (run.checkpoint.resume, run.checkpoint.keep) == ("auto", 2)
    assert (run.eval.interval_steps, run.eval.batch_size, run.log.interval_steps) == (0, 8, 10)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.e-3", 1e-3), (".001", 1e-3), ("0.001", 1e-3), ("1", 1.0)],
)
def test_every_spelling_of_a_number_is_a_number(write, text, value):
    content = yaml.safe_dump(COMPLETE).replace("lr: 0.001", f"lr: {text}")
    assert load_run_config(write(content)).optimizer.lr == value
    assert load_run_config(None, [*flags(COMPLETE), "--optimizer.lr", text]).optimizer.lr == value


def test_digits_may_be_grouped(write):
    run = load_run_config(None, [*flags(COMPLETE), "--training.max_tokens", "1_500_000"])
    assert run.training.max_tokens == 1_500_000


def test_all_errors_come_at_once_one_line_each_with_their_origin(write):
    path = write(
        "model:\n  preset: debugg\n  placement:\n    name: mixln\n"
        "data: {seq_len: 0}\noptimizer:\n  lr: fast\n"
        "training:\n  max_stepz: 10\n  global_batch_size: 4.5\n  precision: fp16\n"
        "output: {dir: r}\n"
    )
    lines = errors(path, ["--schedule.name", "cosin", "--lr=3", "--log.interval_steps"])
    expected = [
        (f"{path}:2: model.preset", "did you mean debug?"),
        (f"{path}:4: model.placement.name", "did you mean mix_ln?"),
        (f"{path}:5: data.path is required", "--data.path VALUE"),
        (f"{path}:5: data.seq_len", "at least 1, found 0"),
        (f"{path}:7: optimizer.lr", "expected a number, found 'fast'"),
        (f"{path}:9: training.max_stepz", "did you mean training.max_steps?"),
        (f"{path}:10: training.global_batch_size", "expected a whole number, found 4.5"),
        (f"{path}:11: training.precision", "expected auto, fp32 or bf16, found 'fp16'"),
        ("--schedule.name", "did you mean cosine?"),
        ("--lr is not a key", "did you mean optimizer.lr?"),
        ("--log.interval_steps: needs a value", "--log.interval_steps VALUE"),
    ]
    for start, end in expected:
        assert any(line.startswith(start) and end in line for line in lines), (start, lines)
    assert any("training.max_steps or training.max_tokens" in line for line in lines)
    assert len(lines) == len(expected) + 1


def test_an_empty_run_names_every_required_key(write):
    lines = errors(write("model:\ndata:\n"))
    for key in ("model.preset", "data.path", "data.seq_len", "optimizer.lr", "output.dir"):
        assert any(f"{key} is required" in line for line in lines)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("model", "presets", "model.preset"),
        ("data", "sequence_len", "data.seq_len"),
        ("training", "microbatch_size", "training.micro_batch_size"),
        ("training", "lr", "optimizer.lr"),
        ("eval", "interval_step", "eval.interval_steps"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_also_of_another_section(write, section, key, nearest):
    content = COMPLETE | {section: COMPLETE.get(section, {}) | {key: 1}}
    (line,) = errors(write(content))
    assert f"{section}.{key} is not a key" in line
    assert line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("path", leaves(RunConfig), ids=".".join)
def test_every_key_refuses_a_wrong_type_by_name(path):
    key = ".".join(path)
    lines = errors(None, [*flags(COMPLETE), f"--{key}=[[1]]"])
    assert any(line.startswith(f"--{key}") and "found" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.micro_batch_size=8"], "more than training.global_batch_size, which is 4"),
        (["--schedule.decay_steps=5"], "only the wsd schedule has a decay phase"),
        (["--schedule.warmup_steps=-1"], "a count of steps (a whole number) or a fraction"),
        (["--schedule.warmup_steps=1.5"], "a count of steps (a whole number) or a fraction"),
        (["--training.max_steps=null"], "nothing ends the run"),
        (["--checkpoint.resume=no/such/folder"], "folder of a checkpoint that exists"),
        (["--optimizer.name=adam"], "did you mean adamw?"),
        (["--optimizer.name=no_such_package.optim:Fancy"], "'no_such_package' is not installed"),
        (["--optimizer.betas=[0.9]"], "at least 2 items"),
        (["--optimizer.betas=[0.9, 1.0]"], "a number below 1"),
        (["--optimizer.lr=0"], "a number above 0, found 0"),
        (["--training.seed=-1"], "at least 0"),
        (["--log.trackers=[wandbb]"], "did you mean wandb?"),
        (["--model.norm.op=rms_norm"], "did you mean rmsnorm?"),
        (["--model.norm.alpha=0.5"], "alpha"),
        (["--model.placement.name=mix_ln", "--model.placement.fractoin=0.5"], "fractoin"),
        (["--model.placement.name=mix_ln", "--model.placement.fraction=2"], "fraction"),
        (["--model.placement.name=mix_ln", "--model.placement.fraction=half"], "expected a number"),
        (["--model.placement.name=normformer", "--model.placement.res_scale=1"], "true or false"),
        (["--model.norm.op=dyt", "--model.norm.alpha=big"], "expected a number"),
        (["--model.norm.op=dyt", "--model.norm.alpha={attn: big}"], "expected a number"),
        (["--model.norm.op=dyt", "--model.norm.alpha=-1"], "alpha"),
        (["--model.norm.eps=0"], "eps"),
        (["--model.overrides.rope_parameters=[]"], "--model.overrides.rope_parameters: "),
        (["--model.overrides.hiden_size=8"], "did you mean hidden_size?"),
        (["--model.overrides.num_attention_heads=3"], "3"),
        (["--model.overrides.embedding=scaled"], "expected one of raw, scale, norm"),
        (["--model.overrides.num_hidden_layers=1000000000"], "at most 10000"),
        (["--model.overrides.norm=dyt"], "model.norm"),
        (["--model.overrides.base=dyt"], "model.preset"),
        (["--data=3"], "expected a section of keys, found 3"),
        (["--data=3", "--data.seq_len=5"], "data is 3, which has no keys"),
        (["lr", "3"], "expected --section.key VALUE"),
        ([f"--output.dir={'x' * 300}"], "longer than any path can be"),
        ([f"--model.preset={'x' * 5000}"], "no preset or folder is named"),
        (["--model.preset=~nobody_of_this_name/x"], "no preset or folder is named"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(overrides, message):
    lines = errors(None, [*flags(COMPLETE), *overrides])
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(
    ("option", "shown"),
    [("alhpa: 1", "alhpa"), ("alpha: 1\n    shift: 2", "shift")],
)
def test_a_wrong_option_is_reported_where_it_stands(write, option, shown):
    path = write(
        yaml.safe_dump(COMPLETE | {"model": None}).replace(
            "model: null", f"model:\n  preset: debug\n  norm:\n    op: dyt\n    {option}"
        )
    )
    line_number = 1 + path.read_text().split("\n").index(
        next(line for line in path.read_text().split("\n") if line.strip().startswith(shown))
    )
    (line,) = errors(path)
    assert line.startswith(f"{path}:{line_number}: model.norm: ")
    assert shown in line


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "a: !!python/tuple [1]",
        "a: !custom {b: 1}",
        "a: !!str 3",
        "!!set {a, b}",
        "a: &x 1",
        "a: &x [1]\nb: *x",
        "a: *nowhere",
        "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]",
        "base: &base {a: 1}\nb:\n  <<: *base",
        "b:\n  <<: {a: 1}",
        "[" * 5000,
        "{a: " * 5000,
        "- " * 5000 + "x",
        "a: 1\na: 2",
        "model: {preset: debug, preset: 9m}",
        "a: 1\n---\na: 2",
        "a: [1, 2",
        "a: 'open",
        "a:\n\t- b",
        "a: .nan",
        "a: [-.inf]",
        "a: 1e999",
        "a: 99999999999999999999",
        "a: " + "9" * 10000,
        "? [1]\n: 2",
        'a: "\\x1b[31m"',
        'a: "\\0"',
        "# " + "x" * 70000,
        "just text",
        "- 1\n- 2",
        "3",
        "@",
        "%YAML 9.9\n---\na: 1",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_hostile_yaml_is_refused_in_one_line_and_at_once(write, text):
    start = time.perf_counter()
    (line,) = errors(write(text))
    assert "run.yaml" in line
    assert time.perf_counter() - start < 2


def test_a_file_that_is_not_utf8_or_is_a_folder_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in errors(path)[0]
    assert "neither a file nor the name of a recipe" in errors(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("~", None),
        ("null", None),
        ("true", True),
        ("-3", -3),
        ("'3'", "3"),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1e2}", {"a": 100.0}),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = read_document(text, "test").value
    assert read == value
    assert type(read) is type(value)


def test_yes_is_not_true(write):
    (line,) = errors(None, [*flags(COMPLETE), "--data.document_mask=yes"])
    assert line == "--data.document_mask: expected true or false, found 'yes'"


@pytest.mark.parametrize(
    ("model", "overrides", "norm", "placement", "notice"),
    [
        (
            {"placement": {"name": "mix_ln", "fraction": 0.5}},
            ["--model.placement.name=lns"],
            {"op": "rmsnorm"},
            {"name": "lns"},
            "--model.placement.name lns replaces mix_ln: its options (fraction=0.5) are dropped",
        ),
        (
            {"norm": {"op": "dyt", "alpha": 0.7}},
            ["--model.norm.eps=1e-5", "--model.norm.op=layernorm"],
            {"op": "layernorm", "eps": 1e-5},
            {"name": "pre_ln"},
            "--model.norm.op layernorm replaces dyt: its options (alpha=0.7) are dropped",
        ),
        (
            {"norm": {"eps": 1e-5}},
            ["--model.norm.op", "dyt"],
            {"op": "dyt"},
            {"name": "pre_ln"},
            "--model.norm.op dyt replaces rmsnorm: its options (eps=1e-05) are dropped",
        ),
    ],
)
def test_another_scheme_drops_the_options_of_the_old_one_with_a_notice(
    write, caplog, model, overrides, norm, placement, notice
):
    path = write(COMPLETE | {"model": {"preset": "debug"} | model})
    with caplog.at_level(logging.WARNING, logger="llmnorm"):
        run = load_run_config(path, overrides)
    assert run.model.norm.model_dump() == norm
    assert run.model.placement.model_dump() == placement
    assert [record.getMessage() for record in caplog.records] == [notice]


def test_naming_the_same_scheme_again_keeps_its_options(write, caplog):
    path = write(COMPLETE | {"model": {"preset": "debug", "norm": {"op": "dyt", "alpha": 0.7}}})
    run = load_run_config(path, ["--model.norm.op=dyt"])
    assert run.model.norm.model_dump() == {"op": "dyt", "alpha": 0.7}
    assert not caplog.records


def test_another_schedule_or_optimizer_drops_what_only_the_old_one_takes(write):
    path = write(
        COMPLETE
        | {"schedule": {"name": "wsd", "decay_steps": 0.3}}
        | {"optimizer": {"lr": 1e-3, "name": "muon", "options": {"momentum": 0.9}}}
    )
    run = load_run_config(path, ["--schedule.name=cosine", "--optimizer.name=adamw"])
    assert run.schedule.decay_steps is None
    assert run.optimizer.options == {}
    assert load_run_config(path).schedule.decay_steps == 0.3


def test_wsd_decays_over_a_fifth_unless_told():
    assert (
        load_run_config(None, [*flags(COMPLETE), "--schedule.name=wsd"]).schedule.decay_steps == 0.2
    )


def test_a_preset_is_a_name_or_a_folder(tmp_path):
    shape = '{"model_type": "llmnorm", "hidden_size": 16, "intermediate_size": 32, '
    (tmp_path / "config.json").write_text(
        shape + '"num_hidden_layers": 1, "num_attention_heads": 2}'
    )
    run = load_run_config(None, [*flags(COMPLETE), f"--model.preset={tmp_path}"])
    assert build_config(**run.model.build_arguments()).hidden_size == 16
    (line,) = errors(None, [*flags(COMPLETE), f"--model.preset={tmp_path.parent}"])
    assert "no config.json" in line


@pytest.mark.parametrize("recipe", ["quickstart", "configs/quickstart.yaml", "pretrain/130m"])
def test_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    assert load_run_config(recipe).model.preset in ("debug", "130m")
    (line,) = errors("quickstrat")
    assert "did you mean quickstart?" in line


def test_the_resolved_run_reads_back_equal(write):
    run = load_run_config(
        None,
        [
            *flags(COMPLETE),
            "--model.norm={op: dyt, alpha: {attn: 1e-1, mlp: 2, final: 3.5}}",
            "--model.overrides={tie_word_embeddings: false, embedding: norm}",
            "--output.dir='1e-3'",
            "--training.compile=false",
        ],
    )
    again = load_run_config(write(run.to_yaml()))
    assert again == run
    assert again.fingerprint() == run.fingerprint()
    assert again.output.dir == Path("1e-3")


CHANGED = {
    "model.imports": "[colorsys]",
    "model.start": "FOLDER",
    "model.preset": "9m",
    "model.norm.op": "layernorm",
    "model.placement.name": "lns",
    "model.overrides": "{embedding: scale}",
    "data.path": "elsewhere",
    "data.mix": "[{path: one, weight: 1}, {path: other, weight: 2}]",
    "data.seq_len": "32",
    "data.document_mask": "true",
    "data.num_workers": "3",
    "optimizer.name": "muon",
    "optimizer.lr": "2e-3",
    "optimizer.weight_decay": "0",
    "optimizer.betas": "[0.9, 0.99]",
    "optimizer.eps": "1e-6",
    "optimizer.options": "{amsgrad: true}",
    "schedule.name": "linear",
    "schedule.warmup_steps": "3",
    "schedule.final_lr_fraction": "0",
    "schedule.decay_steps": "0.5",
    "training.max_steps": "11",
    "training.max_tokens": "100000",
    "training.global_batch_size": "8",
    "training.micro_batch_size": "2",
    "training.seed": "1",
    "training.precision": "bf16",
    "training.compile": "true",
    "training.activation_checkpointing": "true",
    "training.clip_norm": "0",
    "training.init_from": "FOLDER",
    "distill.teacher": "FOLDER",
    "distill.weight": "0.5",
    "distill.temperature": "2",
    "eval.interval_steps": "5",
    "eval.max_documents": "5",
    "eval.batch_size": "5",
    "checkpoint.interval_steps": "5",
    "checkpoint.keep": "5",
    "checkpoint.overlap": "false",
    "checkpoint.resume": "never",
    "checkpoint.stop_at_step": "3",
    "faults.max_bad_steps": "7",
    "faults.spike_sigma": "0",
    "faults.spike_window": "64",
    "faults.meet_seconds": "60",
    "faults.start_seconds": "60",
    "faults.hang_seconds": "60",
    "log.interval_steps": "5",
    "log.trackers": "[wandb]",
    "output.dir": "elsewhere",
}
KEEPS_NUMBERS = {
    "model.imports",
    "data.path",
    "data.num_workers",
    "training.micro_batch_size",
    "training.compile",
    "training.activation_checkpointing",
}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, r"ModuleNotFoundError: No module named 'of_nobody'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import torch\nimport of_no_package", "No module named 'of_no_package'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(code, reason, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if code is not None:
        (tmp_path / "of_nobody.py").write_text(code)
    (line,) = errors(None, [*flags(COMPLETE), "--model.imports=[of_nobody]"])
    assert line.startswith("--model.imports: importing of_nobody fails (")
    assert reason in line
    assert "install it, or put its folder on PYTHONPATH" in line


@pytest.mark.parametrize("path", leaves(RunConfig), ids=".".join)
def test_the_fingerprint_covers_exactly_what_changes_numbers(path, tmp_path):
    build_config("debug").save_pretrained(tmp_path)
    key = ".".join(path)
    wsd = ["--schedule.name=wsd"] if key == "schedule.decay_steps" else []
    base = load_run_config(None, [*flags(COMPLETE), *wsd])
    value = CHANGED[key].replace("FOLDER", str(tmp_path))
    drop = {"data.mix": ["--data.path=null"], "model.start": ["--model.preset=null"]}.get(key, [])
    changed = load_run_config(None, [*flags(COMPLETE), *wsd, *drop, f"--{key}={value}"])
    assert changed != base
    free = ("eval", "checkpoint", "faults", "log", "output")
    harmless = key in KEEPS_NUMBERS or path[0] in free
    assert (changed.fingerprint() == base.fingerprint()) == harmless


MIX = "[{path: one, weight: 1}, {path: other, weight: 0.5}]"
MIXED = [*flags(COMPLETE), "--data.path=null"]


def test_the_fingerprint_follows_the_weights_of_a_mixture_not_its_places():
    run = load_run_config(None, [*MIXED, f"--data.mix={MIX}"])
    assert run.data.sources == [(Path("one"), 1.0), (Path("other"), 0.5)]
    moved = load_run_config(None, [*MIXED, f"--data.mix={MIX.replace('other', 'elsewhere')}"])
    assert moved.fingerprint() == run.fingerprint()
    other = load_run_config(None, [*MIXED, f"--data.mix={MIX.replace('0.5', '0.6')}"])
    assert other.fingerprint() != run.fingerprint()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([f"--data.mix={MIX}"], "--data.path: data.mix names folders too; give one of the two"),
        (["--data.path=null"], "--data.path is required; write it in the run file"),
        (["--data.path=null", "--data.mix=[]"], "a list of at least 1 item"),
        (["--data.path=null", "--data.mix=[a]"], "data.mix.0: expected a section of keys"),
        (["--data.path=null", "--data.mix=[{path: a}]"], "data.mix.0: weight is required there"),
        (
            ["--data.path=null", "--data.mix=[{path: a, weight: 1, wheight: 2}]"],
            "data.mix.0: wheight is not a key there",
        ),
        (
            ["--data.path=null", "--data.mix=[{path: a, weight: 0}]"],
            "data.mix.0.weight: expected a number above 0, found 0",
        ),
    ],
)
def test_data_is_one_folder_or_a_mixture(words, complaint):
    (line,) = errors(None, [*flags(COMPLETE), *words])
    assert complaint in line


def test_help_describes_every_key():
    text = describe_keys()
    for path, field in leaves(RunConfig).items():
        assert f"--{'.'.join(path)}\n" in text
        assert field.description
        assert field.description in text


def test_overrides_are_told_from_other_words():
    words = ["run.yaml", "--a.b", "-1", "--processes", "2", "--c.d=x", "y", "--e.f", "--debug"]
    rest, overrides = split_overrides(words)
    assert rest == ["run.yaml", "--processes", "2", "y", "--debug"]
    assert overrides == ["--a.b", "-1", "--c.d=x", "--e.f"]
