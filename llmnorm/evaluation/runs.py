"""Read what a run directory says about itself: its scheme, its curves, its scores.

Everything comes from the run's own files (`config.yaml`, `environment.json`, `metrics.jsonl`,
`eval/*.json`, `final/`), so that a copied run compares like a local one. `compare.py` is the user.
"""

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmnorm.errors import ConfigError, DataError
from llmnorm.evaluation import records
from llmnorm.evaluation.loading import is_run, read_run_config
from llmnorm.safe_files import open_safetensors

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Downstream:
    """One task's score with its standard error, and the chance level where there is one."""

    metric: str
    score: float
    stderr: float | None
    chance: float | None


@dataclass(frozen=True)
class Run:
    """A run directory, read lazily; made by `open_run`."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def scheme(self) -> str:
        """Placement + norm, with the options that were set."""
        model = self.config["model"]
        placement, norm = dict(model["placement"]), dict(model["norm"])
        names = _named(placement.pop("name"), placement), _named(norm.pop("op"), norm)
        return " + ".join(names)

    @property
    def finished(self) -> bool:
        return (self.path / "final").is_dir()

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.metrics[-1]["tokens"]

    @property
    def train_curve(self) -> Curve:
        """(tokens, loss in nats per token) of every logged step; nan where it was not finite."""
        return self._curve("train/loss")

    @property
    def validation_curve(self) -> Curve:
        """(tokens, loss in nats per token) of the evaluation steps."""
        return self._curve("val/loss")

    @property
    def validation_loss(self) -> float | None:
        """Over the whole validation split where that was scored, else the last one of training."""
        if self.perplexity is not None and self._is_own_validation(self.perplexity):
            return self.perplexity["loss"]
        return self.validation_curve[-1][1] if self.validation_curve else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps, so that warm-up and pauses do not count."""
        speeds = [row.get("perf/tokens_per_second") for row in self.metrics]
        known = [speed for speed in speeds if speed is not None]
        return statistics.median(known) if known else None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json, empty when there is none."""
        file = self.path / "environment.json"
        facts = records.read_json(file) if file.is_file() else {}
        for section in ("data", "parameters", "precision"):
            if not isinstance(facts.get(section, {}), dict):
                raise DataError(f"{file}: {section} is no object; restore what training wrote")
        return facts

    @cached_property
    def parameters(self) -> int | None:
        """Parameters of the model; a head that shares the embedding's matrix counts once."""
        if "total" in self.environment.get("parameters", {}):
            return self.environment["parameters"]["total"]
        shards = sorted((self.path / "final").glob("*.safetensors"))
        return sum(_elements(shard) for shard in shards) if shards else None

    @cached_property
    def perplexity(self) -> dict[str, Any] | None:
        """The newest score of the run's own validation split, else of any text."""
        scores = records.read(self.path, "perplexity")
        own = [score for score in scores if self._is_own_validation(score)]
        return next(reversed(own or scores), None)

    @cached_property
    def downstream(self) -> dict[str, Downstream]:
        """The newest score of every task that was ever run on this model."""
        newest: dict[str, Downstream] = {}
        for record in records.read(self.path, "harness"):
            for task, scores in record["tasks"].items():
                metric = next(
                    (m for m in ("acc", *scores["higher_is_better"]) if m in scores), None
                )
                if metric is not None:
                    newest[task] = Downstream(
                        metric,
                        math.nan if scores[metric] is None else scores[metric],
                        scores.get(f"{metric}_stderr"),
                        scores.get("chance") if metric.startswith("acc") else None,
                    )
        return newest

    @property
    def data_fingerprint(self) -> str | None:
        """Of the prepared folder that the run was trained on."""
        return self.environment.get("data", {}).get("fingerprint")

    def _is_own_validation(self, score: dict[str, Any]) -> bool:
        own = (self.data_fingerprint, "val", None)
        return (score["data_fingerprint"], score["split"], score["max_documents"]) == own

    def _curve(self, key: str) -> Curve:
        return [
            (row["tokens"], math.nan if row[key] is None else row[key])
            for row in self.metrics
            if key in row
        ]


def open_run(path: Path) -> Run:
    """Read a run directory, finished or not.

    Raises:
        ConfigError: the folder is not a run.
        DataError: nothing is logged yet, or the log is damaged.
    """
    if not is_run(path):
        raise ConfigError(
            f"{path} is not a run; expected a folder with config.yaml, as training makes"
        )
    return Run(path, read_run_config(path), _read_metrics(path / "metrics.jsonl"))


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; the run has logged nothing yet")
    rows: list[dict[str, Any]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; restore it") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "tokens": int(row["tokens"])})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break  # a run that is being written, or was killed while writing
            raise DataError(
                f"{file}: line {number} is not a record ({error}); expected JSON with step, tokens"
            ) from error
    if not rows:
        raise DataError(f"{file} holds no record; the run has logged nothing yet")
    return rows


def _named(name: str, options: dict[str, Any]) -> str:
    if not options:
        return name
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def _elements(shard: Path) -> int:
    try:
        with open_safetensors(shard, "np") as tensors:
            names = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (OSError, ValueError) as error:
        raise DataError(f"{shard} cannot be read: {error}; restore it") from error
