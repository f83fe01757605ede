"""Area I: the same run gives the same numbers."""

from pathlib import Path
from typing import Any

from reliability.harness import Trial, bar
from reliability.runs import outcome, run, tiny


def straight(folder: Path) -> tuple[Any, Any]:
    """The outcome of a run that is left alone."""
    config = tiny(folder / "run")
    assert run(config) == 0
    return outcome(config)


@bar("I1", "the same seed twice gives the same bits", total=8, ci=8, prepare=straight)
def same_seed_twice(trial: Trial) -> None:
    config = tiny(trial.folder / "run")
    assert run(config) == 0
    assert outcome(config) == trial.shared
