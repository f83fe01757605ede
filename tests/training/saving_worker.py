"""Two ranks save while the disk of one of them refuses: `python saving_worker.py ROOT`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llmnorm.training import saving
from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.pieces import Piece
from llmnorm.training.ranks import Ranks

dist.init_process_group("gloo")
rank = dist.get_rank()
ranks = Ranks(rank, dist.get_world_size(), torch.device("cpu"))
facts = {"config": "c", "data": "d", "engine": "plain"}
saver = saving.Saver(Checkpoints(Path(sys.argv[1]), ranks, facts=facts), keep=2, overlap=True)
real = saving.write_pieces


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def train_on(step: int) -> None:
    """Save, and go on in steps whose sums tell when no rank is busy, as the loop does."""
    tensor = torch.full((3,), float(step))
    piece = Piece(name="w", slot="", start=3 * rank, tensor=tensor, whole=False)
    saver.save(step, [piece], {"step": step})
    tensor.zero_()
    while saver._under_way is not None:
        (busy,) = ranks.sums(saver.busy)
        if not busy:
            saver.advance()


try:
    for step, failing in enumerate((False, True, True, False, True, True, True), start=1):
        saving.write_pieces = no_space if failing and rank == 1 else real
        train_on(step)
        sys.stdout.write(f"step {step}: {saver.failures}\n")
except BaseException as error:
    sys.stdout.write(f"{type(error).__name__}: {error}\n")
dist.destroy_process_group()
