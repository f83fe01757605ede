"""Measure a loaded model as the commands do: scores together with everything they depend on.

A `Measurement` is the record that goes to stdout and into the run's `eval/`. Use it from a script
to score several models in one process, as `train/quickstart.py` does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmnorm.environment import device_name, versions
from llmnorm.errors import CheckpointError
from llmnorm.evaluation import records
from llmnorm.evaluation.documents import open_documents
from llmnorm.evaluation.harness import score_tasks
from llmnorm.evaluation.loading import Loaded, load
from llmnorm.evaluation.perplexity import score_documents


@dataclass(frozen=True)
class Measurement:
    """A record and the name of its file in a run's `eval/`."""

    name: str
    record: records.Record

    def write(self, loaded: Loaded, out: Path | None = None) -> Path | None:
        """Write to `out`, or to the run that the model is of; elsewhere nothing is written."""
        return records.write(self.record, name=self.name, run=loaded.source.run, out=out)


def measure_perplexity(
    loaded: Loaded,
    data: Path,
    *,
    split: str | None = None,
    text_column: str = "text",
    max_documents: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
) -> Measurement:
    """Score documents; arguments as in `open_documents` and `score_documents`.

    Raises:
        CheckpointError: the loss is not finite, which is no score.
    """
    documents = open_documents(
        data, loaded, split=split, max_documents=max_documents, text_column=text_column
    )
    score = score_documents(
        loaded.model,
        documents.documents,
        eos_token_id=documents.eos_token_id,
        seq_len=loaded.seq_len(seq_len),
        stride=stride,
        batch_size=batch_size,
        rank=rank,
        world=world,
    )
    if not math.isfinite(score.loss):
        raise CheckpointError(
            f"{loaded.source.name}: the loss is not finite ({score.loss}) in {score.dtype};"
            " expected sound weights: use an earlier checkpoint, or --dtype fp32"
        )
    of_split = f"-{documents.record['split']}" if documents.record["split"] else ""
    return Measurement(
        f"perplexity-{data.resolve().name}{of_split}",
        {
            **asdict(score),
            **documents.record,
            "max_documents": max_documents,
            "batch_size": batch_size,
            **_provenance(loaded),
        },
    )


def measure_tasks(
    loaded: Loaded,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
) -> Measurement | None:
    """Score lm-eval tasks; arguments as in `score_tasks`. None on ranks other than 0.

    The longest input is `seq_len`, else what the run was trained with, else the model's positions.
    """
    scores = score_tasks(
        loaded.model,
        loaded.require_tokenizer(),
        names,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        seq_len=seq_len or loaded.trained_seq_len,
        rank=rank,
        world=world,
    )
    if scores is None:
        return None
    record = {"tasks": scores.tasks, "groups": scores.groups, **scores.context}
    name = "harness-" + ",".join(names)
    return Measurement(name, {**record, **_provenance(loaded, "lm_eval")})


def score_run(run: Path, data: Path, tasks: Sequence[str], include_path: Path | None) -> None:
    """Measure perplexity on `data` and lm-eval tasks, and write both to the run's `eval/`."""
    loaded = load(str(run), device=torch.accelerator.current_accelerator() or "cpu")
    for measured in (
        measure_perplexity(loaded, data),
        measure_tasks(loaded, tasks, include_path=include_path),
    ):
        if measured is not None:
            measured.write(loaded)


def _provenance(loaded: Loaded, *packages: str) -> records.Record:
    return {
        "model": loaded.source.name,
        "versions": versions(*packages),
        "device": device_name(loaded.model.device),
    }
