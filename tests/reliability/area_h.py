"""H: a rank that dies, hangs or never comes ends the run in one line that names it."""

import json
import os
import re
import socket
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from reliability.engines import ENGINES, Group, import_engines
from reliability.faulty import failing, program, wait_for
from reliability.harness import Trial, bar
from reliability.runs import fork, tiny, words

from llmnorm.training.checkpoint import verify

DEATHS = ("SIGKILL", "exit", "exception", "runtime error", "data error", "segfault")
HANGS = ("SIGSTOP", "missing")
GONE_SECONDS = 5
HANG_SECONDS = 5
STEP = 4


def engines(_: Path) -> None:
    """Import them once."""
    import_engines()


def pick_engine(trial: Trial) -> str:
    """The engine of a trial, noted; DeepSpeed may be missing."""
    engine = list(ENGINES)[trial.index % len(ENGINES)]
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        trial.skip("deepspeed is not installed")
    trial.note(engine)
    return engine


def fail_one(trial: Trial, kind: str, seconds: float) -> tuple[str, int, list[int | None]]:
    """Let one rank of two or four fail; return the one line, that rank, and the exit codes."""
    engine = pick_engine(trial)
    world = 4 if trial.index % 7 == 6 else 2
    rank, moment = trial.rng.randrange(world), trial.folder / "failed-at"
    run = trial.folder / "run"
    flags = words(run, training__max_steps=400, faults__hang_seconds=HANG_SECONDS)
    work = program(flags, failing(kind, rank, STEP, moment))
    group = Group(engine, world, flags, trial.folder / "logs", work)
    try:
        wait_for(moment, group)
        assert moment.is_file(), group.tail()
        codes = group.wait(seconds)
        late = time.time() - float(moment.read_text())
    finally:
        group.end()
    assert None not in codes, f"{kind} of rank {rank}: {codes} after {late:.1f} s\n{group.tail()}"
    assert late <= seconds, f"gone after {late:.1f} s\n{group.tail()}"
    text = "\n".join(log.read_text(errors="replace") for log in group.logs)
    assert "Traceback" not in text, text[-3000:]
    ours = [line for line in text.splitlines() if re.search(rf"rank {rank}\b|is torn", line)]
    assert len(ours) == 1, f"{kind} of rank {rank}: {ours}\n{text[-3000:]}"
    assert len(ours[0]) <= 300, ours[0]
    told = json.loads((run / "exit.json").read_text())
    assert told["step"] == STEP, told
    assert told["code"] == next(code for code in codes if code and code > 0 and code != 9)
    return ours[0], rank, codes


@bar("H1", "a rank dies: all gone in 5 s, one line", total=30, ci=3, seconds=150, prepare=engines)
def one_rank_dies(trial: Trial) -> None:
    kind = DEATHS[trial.index // len(ENGINES) % len(DEATHS)]
    trial.note(kind)
    line, rank, codes = fail_one(trial, kind, GONE_SECONDS)
    said = {
        "SIGKILL": "was killed by SIGKILL in step 5",
        "exit": "left with exit code 9 in step 5",
        "exception": "failed in step 5: ValueError: made to fail",
        "runtime error": "failed in step 5: RuntimeError: made to fail",
        "data error": "shard 7 is torn",
        "segfault": "was killed by SIGSEGV",
    }[kind]
    assert said in line, line
    run = trial.folder / "run"
    if kind in ("exception", "runtime error", "segfault"):
        trace = (run / f"trace-{rank:05d}.txt").read_text(errors="replace")
        assert "take_step" in trace, trace
    assert all(codes), codes


@bar("H2", "a rank hangs: named in time", total=10, ci=1, seconds=150, prepare=engines)
def one_rank_hangs(trial: Trial) -> None:
    kind = HANGS[trial.index // len(ENGINES) % len(HANGS)]
    trial.note(kind)
    line, rank, _ = fail_one(trial, kind, HANG_SECONDS + 5)
    who = f"rank {rank} " + ("no longer answers" if kind == "SIGSTOP" else "stays behind")
    assert who in line, line
    assert "done, in" in line, line


@bar("H5", "clean runs of two processes", total=100, ci=2, seconds=150, prepare=engines)
def clean_runs(trial: Trial) -> None:
    engine = pick_engine(trial)
    run = trial.folder / "run"
    flags = words(run, data__num_workers=trial.index // len(ENGINES) % 2)
    group = Group(engine, 2, flags, trial.folder / "logs", program(flags))
    try:
        codes = group.wait(120)
        assert codes == [0, 0], f"{codes}\n{group.tail()}"
        for pid in group.pids:
            left = [name for name in os.listdir("/dev/shm") if f"_{pid}_" in name]
            assert not left, left
            with suppress(ProcessLookupError):
                os.killpg(pid, 0)
                raise AssertionError(f"processes of rank group {pid} are left")
    finally:
        group.end()
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    verify(tiny(run).output.dir / "checkpoints" / "step_00000012")


def meeting(rank: int, world: int, port: int, run: Path, log: Path) -> int:
    """Fork rank `rank` of `world` that writes to `log`."""

    def live() -> int:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        return program(words(run))()

    return fork(live)


@bar("H6", "ranks that do not meet: one line within 30 s", total=4, ci=1, seconds=90)
def ranks_do_not_meet(trial: Trial) -> None:
    kind = ("missing", "no rank 0", "port taken", "two jobs")[trial.index]
    trial.note(kind)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind != "port taken":
            server.close()
        begun = time.monotonic()
        logs = [trial.folder / f"log{number}" for number in range(4)]
        run, other = trial.folder / "run", trial.folder / "other"
        started = {
            "missing": [(0, 3, run), (1, 3, run)],
            "no rank 0": [(1, 2, run)],
            "port taken": [(0, 2, run)],
            "two jobs": [(0, 2, run), (1, 2, run), (0, 2, other)],
        }[kind]
        pids = []
        for number, (rank, world, where) in enumerate(started):
            time.sleep(number // 2)  # the other job comes second
            pids.append(meeting(rank, world, port, where, logs[number]))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert time.monotonic() - begun <= 30
    text = [log.read_text(errors="replace") for log in logs[: len(pids)]]
    told = [line for part in text for line in part.splitlines() if f"127.0.0.1:{port}" in line]
    assert len(told) == 1, text
    if kind == "two jobs":
        assert sorted(codes) == [0, 0, 3], (codes, text)
    else:
        assert set(codes) == {3}, (codes, text)
