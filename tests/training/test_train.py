"""Whole runs: what a run directory holds, and that stopping and continuing changes no number."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from llmnorm.config import RunConfig, load_run_config
from llmnorm.data import Prepared
from llmnorm.errors import CheckpointError, ConfigError, EnvironmentProblem
from llmnorm.training.checkpoint import verify
from llmnorm.training.engines.plain import PlainEngine
from llmnorm.training.loop import Trainer, train
from llmnorm.training.signals import STOPPED_BY_SIGNAL
from llmnorm.training.soundness import Diverged

from .conftest import NUMBERS, Killed, metrics, numbers, stop_after

Tiny = Callable[..., RunConfig]


def test_a_run_directory_holds_what_the_contract_names(tiny: Tiny, data: Prepared) -> None:
    config = tiny()
    assert train(config) == 0
    run = config.output.dir
    assert load_run_config(run / "config.yaml") == config
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert set(NUMBERS[:5]) | {"perf/tokens_per_second"} <= set(record)
        assert record["tokens"] == record["step"] * 6 * 32
        assert ("val/loss" in record) == (record["step"] in (4, 8, 12))
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 1
    facts = json.loads((run / "environment.json").read_text())
    assert facts["data"]["fingerprint"] == data.fingerprint
    assert facts["parameters"]["total"] > facts["parameters"]["non_embedding"] > 0
    assert facts["precision"]["name"] == "fp32"
    assert [group["weight_decay"] for group in facts["optimizer"]] == [0.1, 0.0]
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step_00000009", "step_00000012"]


def test_the_final_folder_loads_with_its_tokenizer_and_scores_as_in_training(
    tiny: Tiny, data: Prepared
) -> None:
    from transformers import AutoTokenizer

    from llmnorm.evaluation.perplexity import score_documents

    config = tiny(training__max_steps=4)
    train(config)
    final = config.output.dir / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    score = score_documents(
        model,
        data.split("val").documents_for_scoring(4),
        eos_token_id=data.eos_token_id,
        seq_len=32,
    )
    assert score.loss == pytest.approx(metrics(config.output.dir)[-1]["val/loss"], rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert len(tokenizer) == model.config.vocab_size == data.vocab_size


def test_the_same_seed_gives_the_same_losses_and_another_one_others(tiny: Tiny) -> None:
    runs = [tiny("one"), tiny("two"), tiny("three", training__seed=1)]
    for config in runs:
        train(config)
    one, two, three = (numbers(config.output.dir) for config in runs)
    assert one == two
    assert one[0]["train/loss"] != three[0]["train/loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer__name": "muon"},
        {"optimizer__name": "torch.optim:NAdam"},
        {"training__precision": "bf16"},
        {"model__norm__op": "derf", "training__micro_batch_size": 4},
        {"training__activation_checkpointing": True, "data__document_mask": True},
    ],
    ids=["adamw", "muon", "another_class", "bf16", "derf_accumulated", "checkpointed_masked"],
)
def test_a_stopped_run_continues_bit_for_bit(
    changes: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = tiny("straight", **changes), tiny("stopped", **changes)
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    assert len(metrics(stopped.output.dir)) == 8
    assert train(stopped) == 0
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)
    last = "checkpoints/step_00000012"
    hashes = [verify(c.output.dir / last)["files"] for c in (straight, stopped)]
    assert hashes[0] == hashes[1]


def test_a_run_continues_with_other_micro_batches_and_recomputation(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = tiny("straight"), tiny("stopped")
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    how = {"training__micro_batch_size": 2, "training__activation_checkpointing": True}
    train(tiny("stopped", **how))
    for one, other in zip(numbers(straight.output.dir), numbers(stopped.output.dir), strict=True):
        assert other == pytest.approx(one, rel=1e-6)
        if one["step"] <= 6:
            assert other == one


def test_saving_logging_and_validating_change_no_number(tiny: Tiny) -> None:
    often = tiny("often", checkpoint__interval_steps=1, eval__interval_steps=1)
    never = tiny("never", checkpoint__interval_steps=0, eval__interval_steps=0)
    for config in (often, never):
        train(config)
    keys = NUMBERS[:5]
    left, right = (
        [[r[key] for key in keys] for r in metrics(c.output.dir)] for c in (often, never)
    )
    assert left == right


def test_prefetching_workers_change_no_number(tiny: Tiny) -> None:
    inline, workers = tiny("inline"), tiny("workers", data__num_workers=2)
    for config in (inline, workers):
        train(config)
    assert numbers(inline.output.dir) == numbers(workers.output.dir)


def test_metrics_are_cut_back_to_the_checkpoint_and_a_partial_line_dropped(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    stop_after(5, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    with open(config.output.dir / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "tok')
    stop_after(4, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    assert [record["step"] for record in metrics(config.output.dir)] == [1, 2, 3, 4]


def test_a_finished_run_says_so_and_changes_nothing(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(training__max_steps=2)
    train(config)
    before = {p: p.stat().st_mtime_ns for p in config.output.dir.rglob("*.json*")}
    with caplog.at_level("INFO"):
        assert train(config) == 0
    assert "is finished" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in config.output.dir.rglob("*.json*")}


def test_a_path_continues_another_run_in_a_new_directory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny("first")
    train(first)
    middle = first.output.dir / "checkpoints" / "step_00000009"
    second = tiny("second", checkpoint__resume=str(middle))
    train(second)
    assert numbers(second.output.dir) == numbers(first.output.dir)[9:]


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_start(tiny: Tiny) -> None:
    config = tiny(training__max_steps=6)
    train(config)
    (config.output.dir / "final").rename(config.output.dir.parent / "away")
    for folder in (config.output.dir / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    before = (config.output.dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="verifies"):
        train(config)
    assert (config.output.dir / "metrics.jsonl").read_bytes() == before
    assert json.loads((config.output.dir / "exit.json").read_text())["code"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_step_boundary_and_the_run_continues_bit_for_bit(
    number: signal.Signals, tiny: Tiny
) -> None:
    config = tiny(f"{number.name}", training__max_steps=400, checkpoint__interval_steps=0)
    metrics_file = config.output.dir / "metrics.jsonl"

    def ask() -> None:
        while not metrics_file.is_file() or len(metrics_file.read_bytes().splitlines()) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(number)
    assert train(config) == STOPPED_BY_SIGNAL
    asking.join()
    assert signal.getsignal(number) is before
    leaving = json.loads((config.output.dir / "exit.json").read_text())
    stopped_at = leaving["step"]
    assert leaving["code"] == 75
    assert 3 <= stopped_at < 100
    recorded = metrics(config.output.dir)[-1]["step"]  # one less if a validation was cut short
    assert recorded in (stopped_at - 1, stopped_at)
    verify(config.output.dir / "checkpoints" / f"step_{stopped_at:08d}")
    assert number.name in leaving["cause"]


def test_a_validation_cut_short_twice_leaves_one_record_a_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    real = Trainer.between_batches

    def between_batches(self: Trainer) -> None:
        monkeypatch.setattr(Trainer, "between_batches", real)
        self.stop.ask(signal.SIGTERM)
        real(self)

    monkeypatch.setattr(Trainer, "between_batches", between_batches)
    assert train(config) == STOPPED_BY_SIGNAL
    assert [record["step"] for record in metrics(config.output.dir)] == [1, 2, 3]
    stop_after(5, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    assert train(config) == 0
    assert [record["step"] for record in metrics(config.output.dir)] == list(range(1, 13))


def _poison(steps: set[int], monkeypatch: pytest.MonkeyPatch, value: float) -> list[bool]:
    """Put `value` into one gradient element at these (0-based) steps; record what stayed equal."""
    real = PlainEngine.clip_and_step
    unchanged: list[bool] = []
    calls = iter(range(10_000))

    def clip_and_step(self: PlainEngine, *args: Any, **kwargs: Any) -> Any:
        if next(calls) not in steps:
            return real(self, *args, **kwargs)
        next(iter(self.parameters.values())).grad.view(-1)[3] = value
        before = [piece.tensor.clone() for piece in self.pieces()]
        result = real(self, *args, **kwargs)
        after = [piece.tensor for piece in self.pieces()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        unchanged.append(same and not result.applied)
        return result

    monkeypatch.setattr(PlainEngine, "clip_and_step", clip_and_step)
    return unchanged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_bad_gradient_is_skipped_with_state_untouched(
    value: float, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = _poison({0, 5, 11}, monkeypatch, value)
    config = tiny()
    assert train(config) == 0
    assert unchanged == [True] * 3
    text = (config.output.dir / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [record["skipped_steps"] for record in metrics(config.output.dir)] == [
        *[1] * 5,
        *[2] * 6,
        3,
    ]


def test_five_bad_steps_in_a_row_stop_the_run_and_name_the_checkpoint_from_before(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison({3, 5, 6, 7, 8, 9}, monkeypatch, math.nan)
    config = tiny(checkpoint__keep=1)
    with pytest.raises(Diverged, match=r"up to step 10.*step_00000003; start again"):
        train(config)
    assert json.loads((config.output.dir / "exit.json").read_text())["code"] == 6


def test_the_vocabulary_is_the_datas_unless_a_larger_one_is_given(
    tiny: Tiny, data: Prepared
) -> None:
    overrides = yaml.safe_load(tiny().to_yaml())["model"]["overrides"]
    larger = {**overrides, "vocab_size": data.vocab_size + 28}
    config = tiny("larger", training__max_steps=1, model__overrides=larger)
    train(config)
    model = AutoModelForCausalLM.from_pretrained(config.output.dir / "final")
    assert model.get_input_embeddings().weight.shape[0] == data.vocab_size + 28
    smaller = {**overrides, "vocab_size": data.vocab_size - 1}
    with pytest.raises(ConfigError, match="smaller than the data's vocabulary"):
        train(tiny("smaller", model__overrides=smaller))


def test_a_run_may_start_from_the_weights_of_another(tiny: Tiny) -> None:
    first = tiny("first")
    train(first)
    final = str(first.output.dir / "final")
    second = tiny("second", training__init_from=final)
    train(second)
    assert metrics(second.output.dir)[0]["train/loss"] < metrics(first.output.dir)[3]["train/loss"]
    overrides = yaml.safe_load(first.to_yaml())["model"]["overrides"]
    wider = tiny(
        "wider", training__init_from=final, model__overrides={**overrides, "intermediate_size": 96}
    )
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight is \(32, 64\)"):
        train(wider)
    other = tiny("other", training__init_from=final, model__norm__op="derf")
    with pytest.raises(CheckpointError, match=r"attn\.pre\.op is rmsnorm, this run's derf"):
        train(other)


def test_continuing_needs_no_weights_to_start_from(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny("first", training__max_steps=2)
    train(first)
    final = first.output.dir / "final"
    straight, stopped = (tiny(name, training__init_from=str(final)) for name in ("one", "two"))
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    (final / "model.safetensors").unlink()
    assert train(stopped) == 0
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("llmnorm.training.loop.remember_start", OSError(30, "Read-only file system")),
        (
            "llmnorm.training.engines.plain.PlainEngine.finish",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
    ],
    ids=["environment", "final"],
)
def test_a_full_disk_is_one_line(
    where: str, error: Exception, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(where, refuse)
    config = tiny(training__max_steps=1)
    with pytest.raises(EnvironmentProblem, match=r"cannot be written: .*; make room"):
        train(config)
    leaving = json.loads((config.output.dir / "exit.json").read_text())
    assert (leaving["code"], leaving["rank"]) == (3, 0)


def test_max_tokens_ends_the_run_and_sets_the_schedule(tiny: Tiny) -> None:
    config = tiny(training__max_tokens=5 * 6 * 32 + 7, schedule__final_lr_fraction=0.0)
    train(config)
    records = metrics(config.output.dir)
    assert len(records) == 5
    assert records[-1]["lr"] == 0.0


def test_a_precision_chosen_once_is_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(training__precision="auto")
    monkeypatch.setattr("llmnorm.training.precision._time_both", lambda *_: (2.0, 1.0))
    stop_after(5, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(config)
    monkeypatch.setattr("llmnorm.training.precision._time_both", lambda *_: (1.0, 2.0))
    train(config)
    facts = json.loads((config.output.dir / "environment.json").read_text())
    assert facts["precision"]["name"] == "bf16"
    assert len(facts["restarts"]) == 1
    state = config.output.dir / "checkpoints" / "step_00000012" / "state.json"
    assert json.loads(state.read_text())["precision"] == "bf16"
