"""What a trained model loses when its norms are replaced or removed, against training on with them.

    python benchmarks/conversion.py --text english_mix_small.jsonl.gz   # 10 minutes on one core

A Pre-LN model with rmsnorms is trained on the text. From there every arm reads the same tokens in
the same order, with the same schedule: one keeps its norms (by cross-entropy, and as a student of
itself), one has them removed, others get DyT, Derf and TaperNorm, fitted first. The gap of an arm
is its validation loss minus that of the arm that kept its norms and learned the same way. One seed
and one learning rate: this shows that the conversions work and what they cost on a model of a
million parameters, it ranks nobody. A stopped benchmark continues where it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import write_result

WIDTH, LAYERS, VOCABULARY, SEQ_LEN = 128, 4, 1024, 128
BASE = {"training.max_steps": 200, "training.global_batch_size": 32, "optimizer.lr": 4e-3}
AFTER = {"training.max_steps": 60, "training.global_batch_size": 16, "optimizer.lr": 1e-3}
SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
PARAMETERS = "0.94 million parameters"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "conversion.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
FITTED = ("fixed_std", "dyt", "derf", "tapernorm")


def llmnorm(*words: object) -> None:
    """Run a command; leave with its code if it fails."""
    code = subprocess.call([sys.executable, "-m", "llmnorm", *map(str, words)])
    if code:
        sys.exit(code)


def train(run: Path, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train or continue a run; return the record of its last step."""
    common = {
        "data.path": data,
        "data.seq_len": SEQ_LEN,
        "training.precision": "fp32",
        "training.compile": False,
        "checkpoint.interval_steps": 20,
        "checkpoint.keep": 1,
        "output.dir": run,
    }
    words = [f"--{key}={value}" for key, value in {**common, **settings}.items()]
    llmnorm("train", *words)
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def arm(run: Path, start: Path, data: Path, teacher: Path | None) -> float:
    """Train on from a model; return the validation loss at the end, in nats per token."""
    taught = {} if teacher is None else {"distill.teacher": teacher}
    return train(run, data, {"model.start": start, **taught, **AFTER})["val/loss"]


def convert(base: Path, op: str, data: Path, out: Path) -> dict[str, Any]:
    """Fit and write a converted model, once; return its record."""
    if not out.exists():
        words = ["--to", op, "--data", data, "--out", out]
        llmnorm("convert", base, *words, "--steps", AFTER["training.max_steps"])
    return json.loads((out / "conversion.json").read_text())


def table(record: dict[str, Any]) -> str:
    """Return the result in words and a table, for docs/conversion.md."""
    tokens, kept, nats = record["tokens"], record["kept"], "{:.3f}".format
    lines = [
        f"{PARAMETERS}, {LAYERS} layers of width {WIDTH}, Pre-LN with rmsnorms, trained on "
        f"{tokens['base']:,} tokens to a",
        f"validation loss of {nats(record['base'])}; every arm then reads the same "
        f"{tokens['after']:,} tokens. Kept, the norms give {nats(kept['cross_entropy'])}",
        f"by cross-entropy and {nats(kept['distilled'])} as a student of the model itself. The gap "
        "is to the arm that kept its norms and",
        "learned the same way.",
        "",
        "| to | converted | cross-entropy | gap | distilled | gap |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, found in record["arms"].items():
        cells = [nats(found["converted"])]
        for how in kept:
            cells += [nats(found[how]), f"{found['gap'][how]:+.3f}"]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(record: dict[str, Any]) -> None:
    """Bring docs/conversion.md up to date."""
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{table(record)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Run what is left, then write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="jsonl with a field text")
    parser.add_argument("--runs", type=Path, default=Path("runs/conversion"))
    args = parser.parse_args()
    data, base = args.runs / "data", args.runs / "base"
    if not data.exists():
        source = ["--source", "jsonl", "--path", args.text, "--vocab-size", VOCABULARY]
        llmnorm("data", "prepare", *source, "--out", data)
    shape = {"model.preset": "debug", "model.overrides": json.dumps(SHAPE)}
    before = train(base, data, {**shape, **BASE})["val/loss"]
    kept = {
        "cross_entropy": arm(args.runs / "kept", base, data, None),
        "distilled": arm(args.runs / "kept-distilled", base, data, base),
    }
    arms = {}
    for op in FITTED:
        start = args.runs / f"{op}-start"
        record = convert(base, op, data, start)
        errors = [site["error"] for site in record["fitted"]]
        losses = {
            "cross_entropy": arm(args.runs / op, start, data, None),
            "distilled": arm(args.runs / f"{op}-distilled", start, data, base),
        }
        arms[op] = {
            "converted": record["loss"][1],
            "largest_site_error": max(errors),
            **losses,
            "gap": {how: losses[how] - kept[how] for how in kept},
        }
    gaps = {op: found["gap"]["cross_entropy"] for op, found in arms.items()}
    headline = (
        f"against training on with its norms, a model of {PARAMETERS} loses "
        f"{gaps['fixed_std']:.3f} of {before:.2f} nats when they are removed, {gaps['dyt']:.3f} "
        f"when they become DyT, {gaps['derf']:.3f} Derf, {gaps['tapernorm']:.3f} TaperNorm"
    )
    tokens = {
        name: part["training.max_steps"] * part["training.global_batch_size"] * SEQ_LEN
        for name, part in (("base", BASE), ("after", AFTER))
    }
    figures = {"tokens": tokens, "base": before, "kept": kept, "arms": arms}
    write_result("conversion", headline, figures)
    write_page(figures)


if __name__ == "__main__":
    main()
