"""G: a signal at any moment leaves a checkpoint of all ranks and exit code 75; nothing is lost."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reliability.engines import ENGINES, Group, finished, import_engines
from reliability.faulty import Patch, before_step, program, wait_for
from reliability.harness import Trial, bar
from reliability.runs import outcome, tiny, words

from llmnorm.evaluation import perplexity
from llmnorm.training import saving
from llmnorm.training.checkpoint import verify
from llmnorm.training.loop import Trainer
from llmnorm.training.signals import WATCHED, StopRequest

ANSWER_SECONDS = 10
STEPS = 12
CHANGES = {"training__max_steps": STEPS, "checkpoint__interval_steps": 5}
MOMENTS = ("any", "start", "data", "validation", "save", "twice")


def engines(_: Path) -> None:
    """Import them once."""
    import_engines()


def expected(trial: Trial, engine: str, world: int) -> Any:
    """Numbers and files of a run of this engine that nobody stops."""
    run = trial.folder / "straight"
    finished(engine, world, words(run, **CHANGES), trial.folder / "straight.logs")
    return outcome(tiny(run, **CHANGES))


def slow(work: Callable[..., Any], mark: Path) -> Callable[..., Any]:
    """Return `work` that leaves `mark` and takes half a second more."""

    def slowly(*args: Any, **kwargs: Any) -> Any:
        mark.touch()
        time.sleep(0.5)
        return work(*args, **kwargs)

    return slowly


def slow_down(moment: str, mark: Path) -> Patch:
    """Return a patch that makes the moment last, and leaves `mark` when it has come."""

    def patch() -> None:
        if moment == "start":
            Trainer.build = slow(Trainer.build, mark)  # type: ignore[method-assign]
        elif moment == "data":
            real = StopRequest.waiting

            def waiting(self: StopRequest, batches: Any, count: int) -> Any:
                def slow_batches() -> Any:
                    for number, batch in enumerate(batches):
                        if number == 3:
                            mark.touch()
                            time.sleep(60)
                        yield batch

                return real(self, slow_batches(), count)

            StopRequest.waiting = waiting  # type: ignore[method-assign]
        elif moment == "validation":
            perplexity._score = slow(perplexity._score, mark)
        elif moment == "save":
            saving.write_pieces = slow(saving.write_pieces, mark)
        else:
            before_step(3, lambda _: mark.touch())

    return patch


def stop_and_continue(trial: Trial, engine: str, world: int) -> None:
    """Signal a run at the trial's moment, judge how it leaves, continue it, compare."""
    moment = MOMENTS[trial.index % len(MOMENTS)]
    number = WATCHED[trial.index // len(MOMENTS) % len(WATCHED)]
    trial.note(f"{engine}-{world} {number.name} {moment}")
    run, mark = trial.folder / "run", trial.folder / "mark"
    flags = words(run, **CHANGES)
    work = program(flags, slow_down(moment, mark))
    group = Group(engine, world, flags, trial.folder / "logs", work)
    try:
        if moment == "any":
            time.sleep(trial.rng.uniform(0, 4))
        else:
            wait_for(mark, group)
        send(group, number, trial.rng, twice=moment == "twice")
        codes = group.wait(ANSWER_SECONDS)
        text = group.tail()
    finally:
        group.end()
    early = moment == "any" and codes == [-number] * world  # before the program had begun
    done = codes == [0] * world  # it was over, or is
    interrupted = moment == "twice" and number == signal.SIGINT and set(codes) <= {130, 75}
    assert early or done or interrupted or codes == [75] * world, f"{codes}\n{text}"
    assert "Traceback" not in text, text
    if codes == [75] * world:
        told = json.loads((run / "exit.json").read_text())
        assert told["code"] == 75, told
        if told["step"]:
            manifest = verify(run / "checkpoints" / f"step_{told['step']:08d}")
            assert manifest["world"] == world
    finished(engine, world, flags, trial.folder / "again.logs")
    assert outcome(tiny(run, **CHANGES)) == expected(trial, engine, world)


def send(group: Group, number: signal.Signals, rng: random.Random, *, twice: bool) -> None:
    """Signal one rank or all, perhaps twice."""
    ranks = list(range(len(group.pids)))
    chosen = ranks if twice or rng.random() < 0.5 else [rng.choice(ranks)]
    for _ in range(2 if twice else 1):
        for rank in chosen:
            if rank not in group.codes:
                os.kill(group.pids[rank], number)
        time.sleep(0.2 * twice)


@bar("G1", "a signal to one process", total=36, ci=4, seconds=150, prepare=engines)
def signal_to_one_process(trial: Trial) -> None:
    stop_and_continue(trial, "plain", 1)


@bar("G2", "a signal to one or both of two processes", total=30, ci=2, seconds=200, prepare=engines)
def signal_to_two_processes(trial: Trial) -> None:
    engine = list(ENGINES)[trial.index // len(MOMENTS) % len(ENGINES)]
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        trial.skip("deepspeed is not installed")
    stop_and_continue(trial, engine, 2)
