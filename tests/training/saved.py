"""Small checkpoints without a run, for the tests of what is written and found."""

from pathlib import Path

import torch

from llmnorm.training.checkpoint import Checkpoints
from llmnorm.training.pieces import Piece
from llmnorm.training.ranks import Ranks
from llmnorm.training.saving import Saver

ALONE = Ranks(0, 1, torch.device("cpu"))
FACTS = {"config": "c" * 64, "data": "d" * 64, "engine": "plain"}


def checkpoints_in(root: Path, **facts: str) -> Checkpoints:
    """The checkpoints of a run of one process."""
    return Checkpoints(root, ALONE, facts={**FACTS, **facts})


def pieces_of(step: int) -> list[Piece]:
    """A weight and its moment, whose values are the step."""
    values = torch.full((4, 3), float(step))
    return [
        Piece(name="w", slot="", start=0, tensor=values, whole=True),
        Piece(name="w", slot="exp_avg", start=0, tensor=-values, whole=True),
    ]


def save(checkpoints: Checkpoints, *steps: int, keep: int = 2) -> list[Path]:
    """Save these steps, the last one to its end; return their folders."""
    saver = Saver(checkpoints, keep=keep, overlap=True)
    for step in steps:
        saver.save(step, pieces_of(step), {"step": step}, last=step == steps[-1])
    return [checkpoints.root / f"step_{step:08d}" for step in steps]
