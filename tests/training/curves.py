"""Short training curves that guard the trainer. Run as a script to write them anew:

    python tests/training/curves.py

Do so only for a change that is meant to alter numbers, and say so in the changelog.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.environment import device_name
from llmnorm.training.loop import train

FILE = Path(__file__).with_name("data") / "curves.json"
RUNS: dict[str, dict[str, Any]] = {
    "pre_ln_rmsnorm_cosine": {},
    "peri_ln_layernorm_wsd_masked": {
        "model__placement__name": "peri_ln",
        "model__norm__op": "layernorm",
        "schedule__name": "wsd",
        "data__document_mask": True,
        "training__micro_batch_size": 4,
    },
    "lns_derf_linear_clipped": {
        "model__placement__name": "lns",
        "model__norm__op": "derf",
        "schedule__name": "linear",
        "training__clip_norm": 0.1,
    },
}


def stack() -> dict[str, str]:
    """What a curve is exact on: torch and the processor."""
    return {"torch": torch.__version__, "device": device_name(torch.device("cpu"))}


def tokens_hash(data: Prepared) -> str:
    """Hash of the training tokens: another hash means that the data changed, not the trainer."""
    split = data.split("train")
    return hashlib.sha256(split.window(0, split.tokens).tobytes()).hexdigest()


def curve(data: Prepared, folder: Path, words: list[str]) -> dict[str, list[float]]:
    """Losses and gradient norms of a run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(load_run_config(None, words))
    finally:
        torch.set_num_threads(threads)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: [r[key] for r in records] for key in ("train/loss", "grad_norm")}


def main() -> None:
    """Write the file."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import prepare_corpus, tiny_words

    with tempfile.TemporaryDirectory() as name:
        data = prepare_corpus(Path(name))
        curves = {
            run: curve(data, Path(name) / run, tiny_words(data.path, Path(name) / run, **changes))
            for run, changes in RUNS.items()
        }
        record = {**stack(), "tokens": tokens_hash(data), "curves": curves}
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
