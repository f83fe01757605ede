"""C1: the stream of tokens is the same on any number of processes and workers."""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reliability.harness import Trial, bar
from reliability.runs import corpus, finish, fork
from training.conftest import make_documents

from llmnorm.data import GlobalBatches, Mixture, PrepareOptions, open_mixture, prepare
from llmnorm.data.batches import samples_in
from llmnorm.data.sources import Text

WORLDS = (1, 2, 3, 4, 6, 8)
MICRO_BATCHES = (1, 2, 3, 5, 13)
WORKERS = (0, 1, 2, 3)
SEEDS = range(5)
CASES = list(itertools.product(WORLDS, MICRO_BATCHES, WORKERS, SEEDS))
random.Random(0).shuffle(CASES)  # so that every tenth of them has all values of each
GLOBAL_BATCH, SEQ_LEN, STEPS = 13, 32, 5
WEIGHTS = (0.8, 0.2)


def two_folders(folder: Path) -> list[Path]:
    """A second corpus of other text beside the usual one, with its tokenizer."""
    first = corpus()
    text = folder / "upper.txt"
    text.write_text(make_documents(40, seed=9).upper(), encoding="utf-8")
    options = PrepareOptions(tokenizer=str(first), val_fraction=0.1)

    def work() -> None:
        prepare(Text(text, whole_files=False), folder / "second", options)

    assert finish(fork(work)) == 0
    return [first, folder / "second"]


def rank_batches(data: Mixture, **options: Any) -> GlobalBatches:
    """The loader of one rank, as a run makes it."""
    fixed = {"seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "document_mask": True}
    fixed |= {"eos_token_id": data.eos_token_id, "weights": data.weights}
    return GlobalBatches(*data.train(), **fixed, **options)


def global_rows(steps: Sequence[Sequence[list[dict[str, torch.Tensor]]]]) -> list[torch.Tensor]:
    """Of each rank's steps the global batches, (rows, 3 * seq_len): ids, targets, positions."""
    found = []
    for shares in zip(*steps, strict=True):
        parts = [share[micro] for micro in range(len(shares[0])) for share in shares]
        assert len({value.shape for part in parts for value in part.values()}) == 1
        keys = ("input_ids", "targets", "position_ids")
        whole = torch.cat([torch.cat([part[key] for key in keys], dim=1) for part in parts])
        assert (whole[GLOBAL_BATCH:, SEQ_LEN : 2 * SEQ_LEN] == -100).all()
        found.append(whole[:GLOBAL_BATCH])
    return found


def hashes(batches: list[torch.Tensor]) -> list[str]:
    """SHA-256 of each global batch."""
    return [hashlib.sha256(batch.numpy().tobytes()).hexdigest() for batch in batches]


def read(data: Mixture, start: int, count: int, world: int, **options: Any) -> list[torch.Tensor]:
    """Global batches of `count` steps, each rank read through its own loader in turn."""
    steps = []
    for rank in range(world):
        stream = rank_batches(data, rank=rank, world=world, **options).iterate(start)
        steps.append([next(stream) for _ in range(count)])
        stream.close()
    return global_rows(steps)


def check_epochs(data: Mixture, rows: torch.Tensor) -> None:
    """Each folder's rows have its share, and go through all its samples before any comes again."""
    table = [row.tobytes() for row in np.ascontiguousarray(rows.numpy())]
    seen = 0
    for split, weight in zip(data.train(), data.weights, strict=True):
        count = samples_in(split, SEQ_LEN)
        samples = [split.window(i * SEQ_LEN, SEQ_LEN + 1) for i in range(count)]
        wanted = Counter(np.concatenate([s[:-1], s[1:]]).tobytes() for s in samples)
        own = [row for row in table if row in wanted]
        seen += len(own)
        assert abs(len(own) - weight * len(table)) < max(1, len(data.weights) - 1)
        assert len(own) >= count, "the stretch is too short to show an epoch"
        for begin in range(0, len(own) - count + 1, count):
            assert Counter(own[begin : begin + count]) == wanted, "a sample is lost or repeated"
    assert seen == len(table)


@bar(
    "C1",
    "the same tokens in every step: 1-8 ranks, micro-batches, 0-3 workers, seeds, a mixture",
    total=len(CASES),
    ci=60,
    prepare=two_folders,
)
def the_stream_is_the_same_in_any_world(trial: Trial) -> None:
    world, micro_batch_size, workers, seed = CASES[trial.index]
    options = {"seed": seed, "micro_batch_size": micro_batch_size}
    mixed = list(zip(trial.shared, WEIGHTS, strict=True))
    for sources, num_workers in ((mixed[:1], 0), (mixed, workers)):
        data = open_mixture(sources)
        start = trial.rng.randrange(200)
        alone = read(data, start, STEPS, 1, seed=seed, micro_batch_size=GLOBAL_BATCH)
        found = read(data, start, STEPS, world, num_workers=num_workers, **options)
        assert hashes(found) == hashes(alone)
        samples = sum(samples_in(split, SEQ_LEN) for split in data.train())
        ranks = [rank_batches(data, rank=rank, world=world, **options) for rank in range(world)]
        steps = range(2 * samples // GLOBAL_BATCH + 1)
        rows = torch.cat(global_rows([[rank.step(step) for step in steps] for rank in ranks]))
        check_epochs(data, rows[:, : 2 * SEQ_LEN])
