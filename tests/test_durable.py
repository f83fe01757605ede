"""A lock keeps others out; a file system without locks keeps nobody out and says so."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from llmnorm.durable import take_lock

pytestmark = pytest.mark.fast


def test_a_lock_held_elsewhere_is_not_taken(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert take_lock(fcntl.flock, first, tmp_path)
    assert not take_lock(fcntl.flock, second, tmp_path)
    os.close(first)
    assert take_lock(fcntl.flock, second, tmp_path)
    os.close(second)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    assert take_lock(lock, 0, tmp_path)
    assert f"{tmp_path} cannot be locked" in caplog.text
