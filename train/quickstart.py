"""Train, score and compare four normalization schemes in minutes: what `make quickstart` runs.

A stopped quickstart continues. Run-file keys (--training.max_tokens 100000) reach every training.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

from llmnorm.cli import run_main
from llmnorm.evaluation.measure import score_run
from llmnorm.evaluation.runs import open_run

SCHEMES = ["pre_ln-rmsnorm", "peri_ln-rmsnorm", "lns-rmsnorm", "pre_ln-derf"]
DATA, RUNS, ROOT = Path("data/python-stdlib"), Path("runs/quickstart"), Path(__file__).parents[1]
CPU = ["--config_file", f"{ROOT}/configs/accelerate/cpu.yaml"]
NEXT = f"""Next, for example:
llmnorm generate {RUNS}/lns-rmsnorm -p "import " --temperature 0.8
accelerate launch train/pretrain.py --config quickstart --model.placement.name mix_ln \\
    --output.dir {RUNS}/mix_ln-rmsnorm
llmnorm compare {RUNS}/*-* --plot {RUNS}/loss_curves.png"""
START = time.perf_counter()


def stage(title: str, *words: str | Path) -> None:
    """Say what begins and when; run the Python module, and stop if it fails."""
    seconds = time.perf_counter() - START
    sys.stdout.write(f"\n== [{seconds:4.0f} s] {title}\n{' '.join(map(str, words))}\n")
    sys.stdout.flush()
    if words and (code := subprocess.call([sys.executable, "-m", *map(str, words)])):
        sys.exit(code)


def main(overrides: list[str]) -> None:
    """Prepare, train, score in this process, compare, sample."""
    prepare = ["llmnorm", "data", "prepare", "--source", "python-stdlib", "--vocab-size", "4096"]
    stage("Prepare the source of Python's library", *prepare, "--write-task", "--out", DATA)
    device = ["--num_processes", "1"] if torch.accelerator.is_available() else CPU
    train = ["accelerate.commands.launch", *device, f"{ROOT}/train/pretrain.py", "quickstart"]
    runs = [RUNS / scheme for scheme in SCHEMES]
    for run in runs:
        placement, norm = run.name.split("-")
        scheme = ["--model.placement.name", placement, "--model.norm.op", norm]
        stage(f"Train {placement} + {norm}", *train, *overrides, *scheme, "--output.dir", run)
        if run == runs[0]:  # the precision that was measured faster here is taken for all
            train += ["--training.precision", open_run(run).environment["precision"]["name"]]
    stage("Score: perplexity, and which of four texts goes on after this one?")
    for run in runs:
        score_run(run, DATA, ["python_stdlib_continuation"], include_path=DATA / "tasks")
    stage("Compare", "llmnorm", "compare", *runs, "--plot", RUNS / "loss_curves.png")
    prompt = ["-p", "import", "--temperature", "0.7", "--top-k", "50"]
    stage("Sample", "llmnorm", "generate", runs[0], *prompt)
    stage(NEXT)


if __name__ == "__main__":
    run_main(main)
