"""Progress is a bar on a terminal and a plain line now and then elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from llmnorm.data import progress
from llmnorm.data.progress import PrepareProgress

pytestmark = pytest.mark.fast


def test_plain_lines_say_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([100.0, 101.0, 110.0, 111.0, 121.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with (
        caplog.at_level(logging.INFO, "llmnorm"),
        PrepareProgress("preparing x", 1000, 5000) as shown,
    ):
        shown.update(100, 5000)  # a continued run: what was done before counts for no speed
        shown.update(200, 15_000)
        shown.update(210, 16_000)  # within ten seconds of the last line
        shown.update(310, 26_000)
    assert [record.getMessage() for record in caplog.records] == [
        "preparing x: 15,000 tokens, 1,000/s, 20%, about 1.3 min left",
        "preparing x: 26,000 tokens, 1,000/s, 31%, about 1.1 min left",
    ]


def test_an_unknown_total_gives_no_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "llmnorm"), PrepareProgress("preparing x", None) as shown:
        shown.update(0, 10)
    assert "left" not in caplog.text
    assert "10 tokens" in caplog.text


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120)
    )
    with PrepareProgress("preparing x", 100) as shown:
        shown.update(50, 1234)
    assert "preparing x" in screen.getvalue()
    assert "50%" in screen.getvalue()
    assert "1,234 tokens" in screen.getvalue()
