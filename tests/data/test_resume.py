"""A preparation that is killed and asked for again gives the bytes of one that was not."""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmnorm.data import PrepareOptions, prepare, shards, stream
from llmnorm.data.sources import Document, Text
from llmnorm.errors import DataError

from .conftest import folder_bytes, make_documents

OPTIONS = PrepareOptions(vocab_size=280, val_fraction=0.2, shard_tokens=1500)


@pytest.fixture(scope="module")
def source_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "text.txt"
    path.write_text("\n\n".join(make_documents(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(source_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(Text(source_file, whole_files=False), out, OPTIONS)
    return folder_bytes(out)


def prepare_and_die(source_file: Path, out: Path, deadly_event: int) -> int:
    """Prepare in a child that SIGKILLs itself at an event; 0 if it came to its end before."""
    child = os.fork()
    if child == 0:  # tests must never return from here
        try:
            _kill_at(deadly_event)
            prepare(Text(source_file, whole_files=False), out, OPTIONS)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def _kill_at(deadly_event: int) -> None:
    """Count every step on the way to the disk; commit after every small batch."""
    stream._COMMIT_SECONDS = 0.0
    stream._BATCH_SIZE = 1500
    events = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal events
            events += 1
            if events == deadly_event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "mkdir"),
        (os, "rmdir"),
        (os, "unlink"),
        (shards.NpyAppender, "append"),
        (shards.NpyAppender, "close"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def test_killed_anywhere_and_continued_gives_the_same_bytes(
    source_file: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    trials = killed = 0
    for deadly_event in range(1, 1000, 5):
        out = tmp_path / f"{deadly_event}"
        status = prepare_and_die(source_file, out, deadly_event)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        # Killed a second time while continuing, then left alone.
        killed += prepare_and_die(source_file, out, 12) != 0
        prepare(Text(source_file, whole_files=False), out, OPTIONS)
        assert folder_bytes(out) == uninterrupted
        assert not (tmp_path / f".{out.name}.partial").exists()
        trials += 1
    assert trials > 10
    assert killed > 10


class _Slow(Text):
    """Counts the documents that are read, and stops like Ctrl-C."""

    def __init__(self, path: Path, stop_after: int) -> None:
        super().__init__(path, whole_files=False)
        self.stop_after = stop_after

    def documents_from(self, start: int) -> Iterator[Document]:
        for number, document in enumerate(super().documents_from(start), start=start):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield document


@pytest.mark.fast
def test_work_is_kept_and_another_request_is_refused(
    source_file: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(stream, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(stream, "_BATCH_SIZE", 1000)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(_Slow(source_file, 100), out, OPTIONS)
    assert not out.exists()
    state = (tmp_path / ".out.partial" / "state.json").read_text()
    assert '"consumed":0' not in state
    other = PrepareOptions(vocab_size=290, val_fraction=0.2, shard_tokens=1500)
    with pytest.raises(DataError, match=r"vocab_size = 280, now 290.*--restart"):
        prepare(Text(source_file, whole_files=False), out, other)
    prepare(Text(source_file, whole_files=False), out, OPTIONS)
    assert folder_bytes(out) == uninterrupted


@pytest.mark.fast
def test_an_attempt_that_wrote_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo \xff")
    with pytest.raises(DataError, match="byte 9 is not UTF-8"):
        prepare(Text(path, whole_files=False), tmp_path / "out", OPTIONS)
    path.write_bytes(b"one\n\ntwo \n\nthree")
    assert prepare(Text(path, whole_files=False), tmp_path / "out", OPTIONS).path.is_dir()


@pytest.mark.fast
def test_a_full_disk_is_said_in_a_line_and_the_work_continues(
    source_file: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards.NpyAppender, "append", full)
        with pytest.raises(DataError, match=r"out cannot be written: .*No space left.*continues"):
            prepare(Text(source_file, whole_files=False), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    prepare(Text(source_file, whole_files=False), tmp_path / "out", OPTIONS)
    assert folder_bytes(tmp_path / "out") == uninterrupted


@pytest.mark.fast
def test_restart_drops_unfinished_work(source_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(stream, "_BATCH_SIZE", 1000)
    other = PrepareOptions(vocab_size=290, val_fraction=0.2)
    with pytest.raises(KeyboardInterrupt):
        prepare(_Slow(source_file, 100), tmp_path / "out", OPTIONS)
    prepared = prepare(Text(source_file, whole_files=False), tmp_path / "out", other, restart=True)
    assert prepared.manifest.request["vocab_size"] == 290


@pytest.mark.fast
def test_two_processes_cannot_prepare_one_folder(source_file: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    handle = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="in use by another process"):
        prepare(Text(source_file, whole_files=False), tmp_path / "out", OPTIONS)
    os.close(handle)


@pytest.mark.fast
def test_a_damaged_state_is_named(source_file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(_Slow(source_file, 100), tmp_path / "out", OPTIONS)
    state = tmp_path / ".out.partial" / "state.json"
    state.write_text(state.read_text()[:-5])
    with pytest.raises(DataError, match=r"state\.json is damaged; pass --restart"):
        prepare(Text(source_file, whole_files=False), tmp_path / "out", OPTIONS)
