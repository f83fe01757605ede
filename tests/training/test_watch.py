"""What the watch says of ranks that are gone."""

import errno
import os
import select
import signal
import time

import pytest

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
