"""Put runs side by side: one table, what differs between them, and what the numbers can bear.

Rows are runs in the order given. Under the table stands everything besides the scheme that is not
equal in all runs, data and tokens first, so that no difference is read as the scheme's by mistake.
`curves.py` draws the losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from llmnorm.evaluation.records import to_json
from llmnorm.evaluation.runs import Downstream, Run

CAVEAT = (
    "The table shows the tool, not a ranking of schemes: one seed per row, and at about a million"
    " parameters two seeds of one scheme differ by about 0.02 nats, or more where training is less"
    " steady."
)
ABSENT = "-"

# Keys that change no number, the scheme's own, and precision, of which the decision counts.
_FREE = ("output.", "log.", "checkpoint.", "eval.", "data.path", "data.num_workers", "model.norm.",
         "model.placement.", "training.precision")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Runs with the columns they fill and the sentences that belong under the table."""

    runs: list[Run]
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Build the table of `runs`."""
    tasks = sorted({task for run in runs for task in run.downstream})
    fields: dict[str, Callable[[Run], str]] = {
        "scheme": lambda run: run.scheme,
        "validation loss": lambda run: _number(run.validation_loss, ".4f"),
        "perplexity": lambda run: _number(_of(run.perplexity, "perplexity"), ".3f"),
        "bits per byte": lambda run: _number(_of(run.perplexity, "bits_per_byte"), ".4f"),
        **{_heading(task, runs): _score_of(task) for task in tasks},
        "tokens/s": lambda run: _number(run.tokens_per_second, ",.0f"),
        "parameters": lambda run: _number(run.parameters, ",d"),
    }
    if len({run.scheme for run in runs}) < len(runs):
        fields = {"run": lambda run: str(run.path), **fields}
    return Comparison(
        runs=list(runs),
        columns=list(fields),
        rows=[[show(run) for show in fields.values()] for run in runs],
        notes=[*differences(runs), *_gaps(runs), CAVEAT],
    )


def differences(runs: Sequence[Run]) -> list[str]:
    """One line for each thing besides the scheme that is not equal in all runs, worst first."""
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    lines = []
    for key in keys:
        values = [one.get(key) for one in facts]
        if any(value != values[0] for value in values):
            shown = "; ".join(
                f"{run.path.name} {ABSENT if value is None else value}"
                for run, value in zip(runs, values, strict=True)
            )
            lines.append(f"Besides the scheme, {key} differs: {shown}")
    return lines


def show(comparison: Comparison, console: Console) -> None:
    """Print table and notes to a terminal."""
    console.print(_rich_table(comparison))
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False)


def _rich_table(comparison: Comparison) -> Table:
    table = Table(header_style="bold")
    for column in comparison.columns:
        text = column in ("scheme", "run")
        table.add_column(column, justify="left" if text else "right", no_wrap=text, overflow="fold")
    for row in comparison.rows:
        table.add_row(*row)
    return table


def markdown(comparison: Comparison) -> str:
    """Table and notes as Markdown."""
    lines = ["| " + " | ".join(comparison.columns) + " |"]
    marks = ["---" if column in ("scheme", "run") else "---:" for column in comparison.columns]
    lines.append("| " + " | ".join(marks) + " |")
    lines += ["| " + " | ".join(row) + " |" for row in comparison.rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in comparison.notes)]).rstrip() + "\n"


def plain(comparison: Comparison) -> str:
    """Table and notes in aligned columns, for logs."""
    cells = [comparison.columns, *comparison.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(comparison.columns))]
    left = [column in ("scheme", "run") for column in comparison.columns]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, "", *comparison.notes]) + "\n"


def as_json(comparison: Comparison) -> str:
    """Numbers in full precision, with the notes."""
    return to_json({"runs": [_record(run) for run in comparison.runs], "notes": comparison.notes})


def _record(run: Run) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "scheme": run.scheme,
        "finished": run.finished,
        "steps": run.steps,
        "tokens": run.tokens,
        "validation_loss": run.validation_loss,
        "perplexity": _of(run.perplexity, "perplexity"),
        "bits_per_byte": _of(run.perplexity, "bits_per_byte"),
        "downstream": {task: vars(score) for task, score in run.downstream.items()},
        "tokens_per_second": run.tokens_per_second,
        "parameters": run.parameters,
    }


def _facts(run: Run) -> dict[str, Any]:
    """What must be equal for two rows to differ by their scheme alone, most important first."""
    score = run.perplexity or {}
    settings = {key: value for key, value in _flat(run.config).items() if not key.startswith(_FREE)}
    return {
        "the training data": run.data_fingerprint,
        "tokens trained on": run.tokens,
        "the data of the perplexity": score.get("data_fingerprint"),
        **{f"the {key} of the perplexity": score.get(key)
           for key in ("split", "tokens", "seq_len", "stride", "dtype")},
        **settings,
        "the precision of the training": run.environment.get("precision", {}).get("name"),
        **{f"the {key} of the training": run.environment.get(key)
           for key in ("device", "threads", "world", "git_commit")},
    }  # fmt: skip


def _gaps(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        if not run.finished:
            lines.append(f"{run.path.name} is unfinished: step {run.steps}, {run.tokens:,} tokens.")
        elif run.perplexity is None:
            lines.append(
                f"{run.path.name} has no perplexity yet:"
                f" llmnorm eval perplexity --model {run.path} --data PREPARED"
            )
    return lines


def _heading(task: str, runs: Sequence[Run]) -> str:
    """The task, its metric, and its chance level, which stands beside every score."""
    score = next(run.downstream[task] for run in runs if task in run.downstream)
    chance = "" if score.chance is None else f", chance {score.chance:.3f}"
    return f"{task} ({score.metric}{chance})"


def _score_of(task: str) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        score: Downstream | None = run.downstream.get(task)
        if score is None:
            return ABSENT
        spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        return f"{score.score:.3f}{spread}"

    return show


def _of(record: dict[str, Any] | None, key: str) -> float | None:
    return None if record is None else record[key]


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
