"""What the watch says of ranks that are gone."""

import errno
import os
import select
import signal
import time
from pathlib import Path

import pytest
import torch

from llmnorm.config import FaultsSection
from llmnorm.training.directory import RunDirectory
from llmnorm.training.endings import Ending
from llmnorm.training.ranks import Ranks
from llmnorm.training.signals import StopRequest
from llmnorm.training.watch import Watch, _how_it_died, _list

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2], "ranks 0, 2")],
)
def test_ranks_are_listed_in_spans(ranks: list[int], text: str) -> None:
    assert _list(ranks) == text


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system has no pidfd")
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "was killed by SIGKILL"), (None, "left with exit code 9")]
)
def test_the_cause_of_a_death_is_read_from_the_system(
    number: signal.Signals | None, said: str
) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(0.1)
        if number is not None:
            os.kill(os.getpid(), number)
        os._exit(9)
    descriptor = os.pidfd_open(child)
    select.select([descriptor], [], [])
    assert _how_it_died(descriptor) == said
    os.waitpid(child, 0)
    assert said == _how_it_died(descriptor) or "without a word" in _how_it_died(descriptor)
    os.close(descriptor)


def test_a_system_that_refuses_pidfds_is_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    watch = object.__new__(Watch)
    watch._peers = {}
    watch._follow(1, os.getpid())
    assert watch._peers == {}


def test_the_last_beat_says_done_even_if_the_run_ends_while_one_is_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    ranks = Ranks(0, 2, torch.device("cpu"))
    ending = Ending(directory, ranks, step=lambda: 7)
    watch = Watch(directory, ranks, ending, StopRequest(), FaultsSection())
    watch.folder.mkdir()
    watch._wake, watch._woken = os.pipe()
    watch._poll = select.poll()
    watch._poll.register(watch._wake, select.POLLIN)
    write, written = watch._beat, []

    def beat() -> None:
        write()
        written.append(watch._read_beat(0)["stage"])
        watch.stage = "done"  # the main thread is quick
        os.write(watch._woken, b"\0")

    watch._beat = beat  # type: ignore[method-assign]
    watch._run()
    assert written == ["start", "done"]
