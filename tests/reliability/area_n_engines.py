"""N: the same run file gives the same losses on every engine."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from exact_muon import zeropower
from reliability.area_c import same_losses
from reliability.area_n import far, ragged, weights
from reliability.engines import ENGINES, Group, finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import PRETRAIN, clean_environment
from torch.optim import _muon
from training.conftest import metrics, numbers

from llmnorm.config import load_run_config
from llmnorm.training.loop import train

ROOT = PRETRAIN.parents[1]
STEPS = 20
LOSS_TOLERANCE = 5e-7  # relative, per step, float32
WEIGHT_TOLERANCE = 1e-5  # relative L2: Adam amplifies gradients near zero
SPLITS: list[tuple[str, int, int]] = [
    ("plain", 1, 2),
    ("plain", 1, 8),
    *((engine, 2, micro) for engine in ENGINES for micro in (2, 3)),
]


def _words(output: Path, **changes: Any) -> list[str]:
    """Ragged batches, and a clip that bites."""
    return ragged(output, **{"training__clip_norm": 0.5, **changes})


def _reference(folder: Path) -> Path:
    import_engines()
    finished("plain", 1, _words(folder / "alone"), folder / "logs")
    return folder / "alone"


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
    distance = far(weights(trial.shared, STEPS), weights(run, STEPS))
    assert distance <= WEIGHT_TOLERANCE, f"weights differ by {distance:.1e} in relative L2"


FILES = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPObjective",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


@bar(
    "N3a",
    "accelerate launch with each file of configs/accelerate",
    total=len(FILES),
    ci=len(FILES),
    seconds=150,
    prepare=_reference,
)
def launched(trial: Trial) -> None:
    """The README's command, from the root of the checkout; the log names the engine's class."""
    name = list(FILES)[trial.index]
    trial.note(name)
    run, log = trial.folder / "run", trial.folder / "launch.log"
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    with log.open("wb") as handle:
        code = subprocess.run(
            [*launch, str(PRETRAIN), *_words(run, training__micro_batch_size=2)],
            cwd=ROOT,
            env=clean_environment({}),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    text = log.read_text(errors="replace")
    assert code == 0, text[-3000:]
    assert f"2 processes, {FILES[name]}" in text, text[-3000:]
    worst = same_losses(run, trial.shared, 1)
    assert worst <= LOSS_TOLERANCE, f"losses differ by {worst:.1e} relative"


@bar("N4", "blocks compiled, on every engine", total=3, ci=0, seconds=400, prepare=_reference)
def compiled(trial: Trial) -> None:
    engine, world = (("plain", 1), ("plain", 2), ("fsdp2", 2))[trial.index]
    trial.note(f"{engine}-{world}")
    run = trial.folder / "run"
    changes = {"training__compile": True, "training__micro_batch_size": 2}
    finished(engine, world, _words(run, **changes), trial.folder / "logs", seconds=380)
    worst = same_losses(run, trial.shared, 1)
    assert worst <= 1e-6, f"losses differ by {worst:.1e} relative"


@bar("N6", "curves after 200 steps", total=len(ENGINES), ci=0, seconds=400, prepare=_reference)
def curves(trial: Trial) -> None:
    engine = list(ENGINES)[trial.index]
    trial.note(engine)
    alone, pair = trial.folder / "alone", trial.folder / "pair"
    long = {"training__max_steps": 200, "eval__interval_steps": 100}
    finished("plain", 1, _words(alone, **long), trial.folder / "logs", seconds=180)
    finished(engine, 2, _words(pair, **long), trial.folder / "logs", seconds=200)
    last, other = metrics(alone)[-1], metrics(pair)[-1]
    for key in ("train/loss", "val/loss"):
        assert abs(other[key] / last[key] - 1) <= 1e-4, (key, last[key], other[key])


def _train_with_muon(engine: str, world: int, run: Path, logs: Path) -> None:
    flags = _words(run, optimizer__name="muon", training__micro_batch_size=2)

    def work() -> int:
        _muon._zeropower_via_newtonschulz = zeropower
        return train(load_run_config(None, flags))

    group = Group(engine, world, flags, logs, work)
    try:
        assert group.wait(100) == [0] * world, group.tail()
    finally:
        group.end()


def _muon_alone(folder: Path) -> Path:
    import_engines()
    _train_with_muon("plain", 1, folder / "alone", folder / "logs")
    return folder / "alone"


@bar(
    "N3m",
    "Muon on every engine, its iteration in float64",
    total=len(ENGINES),
    ci=2,
    prepare=_muon_alone,
)
def muon_everywhere(trial: Trial) -> None:
    engine = list(ENGINES)[trial.index]
    trial.note(f"{engine}-2")
    run = trial.folder / "run"
    _train_with_muon(engine, 2, run, trial.folder / "logs")
    worst = same_losses(run, trial.shared, 1)
    assert worst <= LOSS_TOLERANCE, f"losses differ by {worst:.1e} relative"
