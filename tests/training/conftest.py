"""A tiny corpus and tiny runs for the tests of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmnorm.config import RunConfig, load_run_config
from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.sources import Text
from llmnorm.training import loop

TEXT = "the norm of a residual stream grows with depth and every branch adds its own part to it"
WORDS = TEXT.split()

# What must be equal bit for bit between two runs; times are not.
NUMBERS = ("step", "tokens", "train/loss", "lr", "grad_norm", "val/loss")


def make_documents(count: int, seed: int) -> str:
    """Documents of words whose successor depends on the word, so that there is a lot to learn."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        word, words = int(rng.integers(len(WORDS))), []
        for _ in range(int(rng.integers(5, 60))):
            words.append(WORDS[word])
            word = (3 * word + int(rng.integers(2))) % len(WORDS)
        documents.append(" ".join(words))
    return "\n\n".join(documents) + "\n"


def prepare_corpus(folder: Path) -> Prepared:
    """Prepare the same small corpus anywhere: 400 documents, about 300 tokens of vocabulary."""
    text = folder / "corpus.txt"
    text.write_text(make_documents(400, seed=7), encoding="utf-8")
    options = PrepareOptions(vocab_size=300, val_fraction=0.05, shard_tokens=5000)
    return prepare(Text(text, whole_files=False), folder / "prepared", options)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The corpus, prepared once."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


def tiny_words(data: Path, output: Path, **changes: Any) -> list[str]:
    """Overrides of a run of 12 small steps; `changes` name keys with `__` for the dot."""
    values: dict[str, Any] = {
        "model.preset": "debug",
        "model.overrides": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "data.path": str(data),
        "data.seq_len": 32,
        "optimizer.lr": 0.01,
        "schedule.warmup_steps": 2,
        "training.max_steps": 12,
        "training.global_batch_size": 6,
        "training.precision": "fp32",
        "eval.interval_steps": 4,
        "eval.max_documents": 4,
        "checkpoint.interval_steps": 3,
        "log.interval_steps": 100,
        "output.dir": str(output),
    }
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    return [word for key, v in values.items() for word in (f"--{key}", json.dumps(v))]


@pytest.fixture
def tiny(data: Prepared, tmp_path: Path) -> Callable[..., RunConfig]:
    """Make the run file of a tiny run: `tiny("name", optimizer__lr=0.1)`."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        return load_run_config(None, tiny_words(data.path, tmp_path / name, **changes))

    return make


def metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def numbers(run: Path) -> list[dict[str, Any]]:
    """The records of a run without its times."""
    return [{key: r[key] for key in NUMBERS if key in r} for r in metrics(run)]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the run fail after `step` steps, once."""
    real = loop.Trainer.take_step

    def take_step(self: loop.Trainer, micro_batches: Any) -> Any:
        if self.step == step:
            monkeypatch.setattr(loop.Trainer, "take_step", real)
            raise error
        return real(self, micro_batches)

    monkeypatch.setattr(loop.Trainer, "take_step", take_step)


class Killed(BaseException):
    """Stands for a kill inside a test's own process."""
