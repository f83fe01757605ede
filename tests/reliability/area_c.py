"""C: a run continues on any number of processes and on any engine, without a conversion step."""

import shutil
from pathlib import Path
from typing import Any

from reliability.engines import ENGINES, finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import words
from training.conftest import make_documents, metrics

from llmnorm.config import load_run_config
from llmnorm.data import PrepareOptions, prepare
from llmnorm.data.sources import Text
from llmnorm.errors import LlmNormError
from llmnorm.training.loop import train

STEPS, CUT = 20, 8
WORLDS = (1, 2, 4)
PLACES = [(engine, world) for engine in ENGINES for world in WORLDS]
TRANSITIONS = [(a, b) for a in PLACES for b in PLACES]
CHAIN = [("plain", 1), ("plain", 2), ("zero2", 2), ("fsdp2", 2), ("zero3", 2), ("plain", 1)]
LOSS_TOLERANCE = 1e-6  # relative, per step, float32


def run_words(output: Path, **changes: Any) -> list[str]:
    """20 steps of 6 rows: 4 ranks get unequal numbers of rows."""
    fixed: dict[str, Any] = {
        "training__max_steps": STEPS,
        "optimizer__lr": 3e-3,
        "checkpoint__keep": 100,
        "checkpoint__interval_steps": CUT,
        "eval__interval_steps": 10,
    }
    return words(output, **{**fixed, **changes})


def straight(folder: Path) -> Path:
    """The uninterrupted run of one process."""
    import_engines()
    run = folder / "straight"
    finished("plain", 1, run_words(run), folder / "logs")
    return run


def same_losses(run: Path, reference: Path, first: int) -> float:
    """Return the largest relative difference of the losses from step `first` on."""
    records, expected = metrics(run), metrics(reference)
    assert [record["step"] for record in records] == list(range(first, STEPS + 1))
    worst = 0.0
    for record in records:
        wanted = expected[record["step"] - 1]
        assert record["tokens"] == wanted["tokens"]
        for key in ("train/loss", "val/loss"):
            if key in wanted:
                worst = max(worst, abs(record[key] / wanted[key] - 1))
    return worst


@bar(
    "C2",
    "saved on one engine and world, continued on another",
    total=len(TRANSITIONS),
    ci=4,
    seconds=240,
    prepare=straight,
)
def continued_elsewhere(trial: Trial) -> None:
    (engine, world), (next_engine, next_world) = TRANSITIONS[trial.index]
    trial.note(f"{engine}-{world} to {next_engine}-{next_world}")
    before = trial.shared.parent / f"{engine}-{world}"  # made by the first trial that needs it
    after = trial.folder / "after"
    finished(engine, world, run_words(before), trial.folder / "logs")
    assert same_losses(before, trial.shared, 1) <= LOSS_TOLERANCE
    place = before / "checkpoints" / f"step_{CUT:08d}"
    continued = run_words(after, checkpoint__resume=str(place))
    finished(next_engine, next_world, continued, trial.folder / "logs")
    assert same_losses(after, trial.shared, CUT + 1) <= LOSS_TOLERANCE
    if (engine, world) == (next_engine, next_world):
        exact = [r["train/loss"] for r in metrics(before)[CUT:]]
        assert [r["train/loss"] for r in metrics(after)] == exact, "not bit for bit"


@bar("C3", "one run through six engines and worlds in a row", total=5, ci=0, seconds=400)
def chained(trial: Trial) -> None:
    import_engines()
    every = {"training__seed": trial.index, "checkpoint__interval_steps": 3}
    reference = trial.folder / "reference"
    finished("plain", 1, run_words(reference, **every), trial.folder / "logs")
    before: dict[str, str] = {}
    for link, (engine, world) in enumerate(CHAIN):
        trial.note(f"{engine}-{world}")
        run = trial.folder / f"link{link}"
        finished(engine, world, run_words(run, **every, **before), trial.folder / "logs")
        assert same_losses(run, reference, 3 * link + 1) <= LOSS_TOLERANCE
        place = run / "checkpoints" / f"step_{3 * (link + 1):08d}"
        before = {"checkpoint__resume": str(place)}


@bar("C4", "a global batch that no split divides evenly", total=10, ci=2, prepare=straight)
def undivided(trial: Trial) -> None:
    """5 rows on 2 to 4 ranks and micro-batches of 1 to 3: the same global batch every time."""
    uneven = {"training__global_batch_size": 5, "checkpoint__interval_steps": 0}
    world = (2, 3, 4)[trial.index % 3]
    engine = ("plain", "fsdp2")[trial.index % 2]
    trial.note(f"{engine}-{world}")
    alone, split = trial.folder / "alone", trial.folder / "split"
    finished("plain", 1, run_words(alone, **uneven), trial.folder / "logs")
    uneven["training__micro_batch_size"] = min(1 + trial.index % 3, -(-5 // world))
    finished(engine, world, run_words(split, **uneven), trial.folder / "logs")
    assert same_losses(split, alone, 1) <= LOSS_TOLERANCE


CHANGED: list[tuple[str, Any, str]] = [
    ("training__seed", 5, "training.seed"),
    ("model__norm", "derf", "model.norm"),
    ("model__placement", "post_ln", "model.placement"),
    ("model__placement", {"name": "mix_ln", "post_fraction": 0.5}, "model.placement"),
    ("model__overrides", {"num_hidden_layers": 3, "hidden_size": 32}, "num_hidden_layers"),
    ("model__preset", "9m", "model.preset"),
    ("optimizer__lr", 0.02, "optimizer.lr"),
    ("optimizer__betas", [0.9, 0.999], "optimizer.betas"),
    ("optimizer__weight_decay", 0.2, "optimizer.weight_decay"),
    ("optimizer__name", "muon", "optimizer.name"),
    ("schedule__warmup_steps", 3, "schedule.warmup_steps"),
    ("training__max_steps", 30, "training.max_steps"),
    ("training__global_batch_size", 8, "training.global_batch_size"),
    ("training__clip_norm", 0.1, "training.clip_norm"),
    ("data__seq_len", 16, "data.seq_len"),
    ("data__document_mask", True, "data.document_mask"),
    ("data", "other text", "data"),
    ("data", "other tokenizer", "data"),
    ("data", "other split", "data"),
    ("training__precision", "bf16", "training.precision"),
]


def _stopped(folder: Path) -> Path:
    """A run that began: its checkpoints stand, its model does not."""
    run = folder / "stopped"
    finished("plain", 1, run_words(run), folder / "logs")
    shutil.rmtree(run / "final")
    return run


def _other_data(trial: Trial, what: str) -> str:
    folder = trial.folder / "data"
    folder.mkdir()
    text = folder / "corpus.txt"
    text.write_text(make_documents(400, seed=8 if what == "other text" else 7), encoding="utf-8")
    options = PrepareOptions(
        vocab_size=290 if what == "other tokenizer" else 300,
        val_fraction=0.10 if what == "other split" else 0.05,
        shard_tokens=5000,
    )
    return str(prepare(Text(text, whole_files=False), folder / "prepared", options).path)


@bar(
    "C5",
    "data, tokenizer, model, seed or recipe changed: refused by name",
    total=len(CHANGED),
    ci=len(CHANGED),
    prepare=_stopped,
)
def changed(trial: Trial) -> None:
    key, value, named = CHANGED[trial.index]
    change = {"data__path": _other_data(trial, value)} if key == "data" else {key: value}
    run = trial.folder / "run"
    shutil.copytree(trial.shared, run)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}
    said = ""
    try:
        train(load_run_config(None, run_words(run, **change)))
    except LlmNormError as error:
        said = str(error)
    assert named in said, f"{named} changed; the run said {said!r}"
    assert len(said.splitlines()) == 1
    assert all(path.read_bytes() == content for path, content in before.items())
