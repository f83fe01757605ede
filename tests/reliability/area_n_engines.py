"""N: the same run file gives the same losses on every engine."""

from pathlib import Path
from typing import Any

import torch
from reliability.area_c import same_losses
from reliability.engines import ENGINES, finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import words
from training.conftest import numbers

from llmnorm.training.pieces import PieceReader

STEPS = 20
LOSS_TOLERANCE = 5e-7  # relative, per step, float32
WEIGHT_TOLERANCE = 1e-5  # relative L2: Adam amplifies gradients near zero
SPLITS: list[tuple[str, int, int]] = [
    ("plain", 1, 2),
    ("plain", 1, 8),
    *((engine, 2, micro) for engine in ENGINES for micro in (2, 3)),
]


def _words(output: Path, **changes: Any) -> list[str]:
    """5 rows, documents masked: ranks and micro-batches have unequal numbers of targets."""
    fixed: dict[str, Any] = {
        "training__max_steps": STEPS,
        "training__global_batch_size": 5,
        "data__document_mask": True,
        "optimizer__lr": 3e-3,
        "training__clip_norm": 0.5,
    }
    return words(output, **{**fixed, **changes})


def _reference(folder: Path) -> Path:
    import_engines()
    finished("plain", 1, _words(folder / "alone"), folder / "logs")
    return folder / "alone"


def _weights(run: Path) -> torch.Tensor:
    reader = PieceReader(run / "checkpoints" / f"step_{STEPS:08d}", "model")
    sizes = {name: sum(p.numel for p in reader._pieces(name)) for name in sorted(reader.names())}
    return torch.cat([reader.flat(name, 0, size) for name, size in sizes.items()]).double()


@bar("N1", "activations recomputed: bit for bit", total=5, ci=1, prepare=_reference)
def recomputed(trial: Trial) -> None:
    engine = list(ENGINES)[trial.index]
    trial.note(engine)
    kept, again = trial.folder / "kept", trial.folder / "again"
    finished(engine, 2, _words(kept), trial.folder / "logs")
    changes = {"training__activation_checkpointing": True}
    finished(engine, 2, _words(again, **changes), trial.folder / "logs")
    assert numbers(kept) == numbers(again)


@bar("N2", "ZeRO-1 and ZeRO-2: bit for bit", total=1, ci=1, prepare=_reference)
def zero_1_and_2(trial: Trial) -> None:
    for engine in ("zero1", "zero2"):
        finished(engine, 2, _words(trial.folder / engine), trial.folder / "logs")
    assert numbers(trial.folder / "zero1") == numbers(trial.folder / "zero2")


@bar(
    "N3",
    "losses of every engine and split against one process",
    total=len(SPLITS),
    ci=len(SPLITS) // 2,
    seconds=120,
    prepare=_reference,
)
def every_engine(trial: Trial) -> None:
    engine, world, micro = SPLITS[trial.index]
    trial.note(f"{engine}-{world}")
    run = trial.folder / "run"
    micro = min(micro, -(-5 // world))
    changes = {"training__micro_batch_size": micro}
    finished(engine, world, _words(run, **changes), trial.folder / "logs")
    worst = same_losses(run, trial.shared, 1)
    assert worst <= LOSS_TOLERANCE, f"losses differ by {worst:.1e} relative"
    one, other = _weights(trial.shared), _weights(run)
    distance = ((one - other).norm() / one.norm()).item()
    assert distance <= WEIGHT_TOLERANCE, f"weights differ by {distance:.1e} in relative L2"
