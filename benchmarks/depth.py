"""Which placements still learn in a stack of 200 layers, and two of them in one of 1,000.

    python benchmarks/depth.py                       # all of it
    python benchmarks/depth.py --only keel post_ln   # some schemes; the rest keeps its numbers

Every run goes through the ordinary trainer on the source of Python's own library: width 64, one
learning rate for all but Fixup (at 1e-3 it diverges) and one embedding treatment for all but nGPT,
whose embedding has rows of length 1 and whose steps are as short as there are sublayers.
Matrices start at 1/sqrt(width), where a branch is as large as the stream: at 0.02 the branches of
so narrow a model hardly touch the stream, and even Post-LN learns. (DeepNorm, SubLN and Fixup bring
their own init.) A stopped benchmark continues where it was, from the runs' checkpoints. The losses
of each run stand in `results/depth.json`, null where they were not finite, the curves
(`depth_figure.py`) in `results/depth.png`. One seed and one learning rate: this shows who learns at
such depth, it ranks nobody.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from depth_figure import draw
from record import RESULTS, write_result

from llmnorm.data import open_prepared

WINDOW = 10
"""A stack learns if the mean loss of its last so many steps is below the unigram entropy,"""
FALLS_BY = 0.5
"""and its loss falls if that mean is so many nats below the first step's."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A deep run: its scheme, how deep and how long."""

    placement: str
    options: dict[str, str] = field(default_factory=dict)
    norm: str = "rmsnorm"
    overrides: dict[str, str] = field(default_factory=lambda: {"embedding": "scale"})
    lr: float = 1e-3
    layers: int = 200
    steps: int = 300

    @property
    def name(self) -> str:
        return f"{self.placement}-{self.layers}"


STACKS = [
    Stack(placement="post_ln"),
    Stack(placement="pre_ln"),
    Stack(placement="deepnorm"),
    Stack(placement="keel"),
    Stack(placement="lns"),
    Stack(placement="peri_ln"),
    Stack(placement="sub_ln"),
    Stack(placement="gpas"),
    Stack(placement="residual_dual"),
    Stack(placement="siamese_norm"),
    Stack(placement="span_norm"),
    Stack(placement="admin"),
    Stack(placement="depth_scaled"),
    Stack(placement="completep", options={"base_width": "64"}),
    Stack(placement="layerscale"),
    Stack(placement="skip_init"),
    Stack(placement="rezero", norm="none"),
    Stack(placement="fixup", norm="none", lr=2e-4),
    Stack(placement="ngpt", norm="l2norm", options={"rate": "0.0025"}, overrides={}),
    Stack(placement="deepnorm", layers=1000, steps=100),
    Stack(placement="keel", layers=1000, steps=100),
]


def train(stack: Stack, data: Path, runs: Path) -> Path:
    """Train or continue one stack; return its run directory, whatever became of it."""
    run = runs / stack.name
    if (run / "exit.json").is_file() and json.loads((run / "exit.json").read_text())["code"] == 6:
        return run  # diverged, which is a result
    settings = {
        "model.preset": "debug",
        "model.norm.op": stack.norm,
        "model.placement.name": stack.placement,
        **{f"model.placement.{key}": value for key, value in stack.options.items()},
        "model.overrides.hidden_size": 64,
        "model.overrides.intermediate_size": 176,
        "model.overrides.num_hidden_layers": stack.layers,
        "model.overrides.initializer_range": 0.125,
        **{f"model.overrides.{key}": value for key, value in stack.overrides.items()},
        "data.path": data,
        "data.seq_len": 64,
        "optimizer.lr": stack.lr,
        "schedule.warmup_steps": stack.steps // 10,
        "training.max_tokens": "null",
        "training.max_steps": stack.steps,
        "training.global_batch_size": 4,
        "training.precision": "fp32",
        "training.compile": "false",
        "eval.interval_steps": 0,
        "eval.max_documents": 1,
        "checkpoint.interval_steps": 25,
        "checkpoint.keep": 1,
        "output.dir": run,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    code = subprocess.call([sys.executable, "-m", "llmnorm", "train", "quickstart", *words])
    if code not in (0, 6):
        sys.exit(code)
    return run


def unigram_entropy(data: Path) -> float:
    """The loss in nats of a model that knows how often each token occurs, and nothing else."""
    tokens = open_prepared(data).split("train")
    counts = np.bincount(tokens.window(0, tokens.tokens))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def column(run: Path, key: str) -> list[float | None]:
    """A metric of every step, None where it was not finite."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [_finite(json.loads(line)[key]) for line in lines]


def measured(stack: Stack, run: Path, entropy: float) -> dict:
    """What is kept of a run: its scheme, how the loss began and ended, and the curve."""
    losses = column(run, "train/loss")
    end = losses[-WINDOW:]
    last = None if None in end else statistics.fmean(end)
    return {
        "placement": stack.placement,
        "norm": stack.norm,
        "commit": json.loads((run / "environment.json").read_text())["git_commit"],
        "layers": stack.layers,
        "steps": len(losses),
        "options": stack.options,
        "lr": stack.lr,
        "first_loss": losses[0],
        "last_loss": last,
        "largest_grad_norm": max(filter(None, column(run, "grad_norm"))),
        "falls": last is not None and last < losses[0] - FALLS_BY,
        "learns": last is not None and last < entropy,
        "losses": [None if loss is None else round(loss, 4) for loss in losses],
    }


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def main() -> None:
    """Run what is left, then write result and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PLACEMENT", help="these placements alone")
    parser.add_argument("--data", type=Path, default=Path("data/depth"))
    parser.add_argument("--runs", type=Path, default=Path("runs/depth"))
    args = parser.parse_args()
    if not args.data.exists():
        source = ["--source", "python-stdlib", "--vocab-size", "1024", "--out", str(args.data)]
        subprocess.check_call([sys.executable, "-m", "llmnorm", "data", "prepare", *source])
    path = RESULTS / "depth.json"
    rows = json.loads(path.read_text())["stacks"] if path.is_file() else {}
    entropy = unigram_entropy(args.data)
    for stack in STACKS:
        if args.only is None or stack.placement in args.only:
            rows[stack.name] = measured(stack, train(stack, args.data, args.runs), entropy)
    counts = {word: sum(row[word] for row in rows.values()) for word in ("falls", "learns")}
    headline = (
        f"the loss falls in {counts['falls']} of {len(rows)} deep stacks, below the unigram "
        f"entropy in {counts['learns']}"
    )
    draw(rows, entropy, WINDOW, RESULTS / "depth.png")
    write_result("depth", headline, {"unigram_entropy": entropy, "stacks": rows})


if __name__ == "__main__":
    main()
