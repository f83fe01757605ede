"""A3: two ranks of every engine, one or both killed, continue bit for bit."""

import time
from pathlib import Path
from typing import Any

from reliability.engines import ENGINES, Group, finished, import_engines
from reliability.harness import Trial, bar
from reliability.runs import words
from training.conftest import numbers

STEPS = 12
VICTIMS = ((0,), (1,), (0, 1))


def _words(output: Path, **changes: Any) -> list[str]:
    fixed: dict[str, Any] = {"training__max_steps": STEPS, "checkpoint__interval_steps": 2}
    return words(output, **{**fixed, "training__micro_batch_size": 2, **changes})


def _prepare(folder: Path) -> None:
    import_engines()


def _wait_until(trial: Trial, run: Path, inside_a_save: bool) -> None:
    """Wait for a random step, or for a save after it; leave some time to chance."""
    step, end = trial.rng.randrange(1, STEPS), time.monotonic() + 60
    path = run / "metrics.jsonl"
    while time.monotonic() < end:
        recorded = path.read_bytes().count(b"\n") if path.is_file() else 0
        saving = any((run / "checkpoints").glob(".step_*"))
        if recorded >= STEPS - 1 or (recorded >= step and saving >= inside_a_save):
            break
        time.sleep(0.001)
    time.sleep(trial.rng.random() * 0.02)


@bar("A3", "one rank, or both, killed with SIGKILL", total=60, ci=5, seconds=240, prepare=_prepare)
def killed_ranks(trial: Trial) -> None:
    engine = list(ENGINES)[trial.index % len(ENGINES)]
    victims = VICTIMS[trial.index // len(ENGINES) % len(VICTIMS)]
    inside = trial.rng.random() < 0.5
    trial.note(engine)
    straight, killed = trial.folder / "straight", trial.folder / "killed"
    finished(engine, 2, _words(straight), trial.folder / "logs")
    group = Group(engine, 2, _words(killed), trial.folder / "logs")
    try:
        _wait_until(trial, killed, inside)
        for rank in victims:
            group.kill(rank)
        codes = group.wait(20)
    finally:
        group.end()
    assert None not in codes, f"{codes} 20 s after rank {victims} was killed: a rank stayed"
    finished(engine, 2, _words(killed), trial.folder / "logs")
    assert numbers(killed) == numbers(straight)
