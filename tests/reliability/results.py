"""What a nightly run keeps: progress for a stopped one, and the table RESULTS.md."""

import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.harness import Bar

ROOT = Path(__file__).resolve().parents[2]
MOST_NOTES = 8
TABLE = Path(__file__).with_name("RESULTS.md")

HEADER = """# Last nightly result of each bar

Written by `make test-nightly`; rows of bars that a run leaves out stay as they were. A plus after
the commit says that the checkout had changes of its own.

| bar | what | tried | passed | skipped | ran | seconds | seed | commit |
| --- | --- | ---: | ---: | ---: | --- | ---: | --- | --- |
"""


@dataclass
class Tally:
    """What became of one bar."""

    bar: Bar
    trials: int = 0
    finished: bool = False
    attempts: dict[int, dict[str, Any]] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """How many trials ended so: passed, failed or skipped."""
        return sum(attempt["verdict"] == verdict for attempt in self.attempts.values())

    @property
    def sound(self) -> bool:
        """Whether it has trials, all were run and none failed."""
        return self.finished and 0 < self.trials <= len(self.attempts) and not self.count("failed")

    @property
    def tried(self) -> int:
        """How many trials were run to a verdict."""
        return len(self.attempts) - self.count("skipped")

    @property
    def seconds(self) -> float:
        """Time of all trials together."""
        return sum(attempt["seconds"] for attempt in self.attempts.values())

    @property
    def ran(self) -> str:
        """The commonest notes of its trials, with how often each was made."""
        notes = Counter(n for attempt in self.attempts.values() for n in attempt["notes"])
        shown = [f"{note} {count}" for note, count in notes.most_common(MOST_NOTES)]
        more = len(notes) - len(shown)
        return ", ".join([*shown, *([f"{more} others"] if more else [])])


def commit() -> tuple[str, str]:
    """Return the commit to show (with a plus when the checkout was changed) and to key by."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    shown = git("rev-parse", "HEAD").strip()[:12] or "unknown"
    changes = git("diff", "HEAD", "--", ".", f":!{TABLE.relative_to(ROOT)}")
    if not changes:
        return shown, shown
    return f"{shown}+", f"{shown}-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"


class Progress:
    """The attempts of a nightly run, so that a stopped one goes on; a finished one begins again.

    Args:
        root: the folder for all commits, ignored by git.
        key: commit and seed.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key

    def load(self, bar: str) -> dict[int, dict[str, Any]]:
        """Return the attempts that an earlier start recorded, by index."""
        path = self.folder / f"{bar}.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        attempts = {}
        for line in lines:
            try:
                attempt = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut
            attempts[attempt["index"]] = attempt
        return attempts

    def add(self, attempt: dict[str, Any]) -> None:
        """Record one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{attempt['bar']}.jsonl", "a") as handle:
            handle.write("\n" * (handle.tell() > 0) + json.dumps(attempt))

    def forget(self, bars: Iterable[str]) -> None:
        """Drop the attempts of bars that are done."""
        for bar in bars:
            (self.folder / f"{bar}.jsonl").unlink(missing_ok=True)


def write_table(path: Path, tallies: Iterable[Tally], *, seed: int, commit: str) -> None:
    """Replace the rows of these bars, keep the others."""
    rows = {}
    if path.is_file():
        found = re.findall(r"^\| ([A-Z]\d+[a-z]?) \|.*$", path.read_text(), flags=re.MULTILINE)
        lines = path.read_text().splitlines()
        rows = {name: next(x for x in lines if x.startswith(f"| {name} |")) for name in found}
    for tally in tallies:
        numbers = [tally.tried, tally.count("passed"), tally.count("skipped")]
        cells = [tally.bar.id, tally.bar.what, *numbers, tally.ran, f"{tally.seconds:.0f}"]
        rows[tally.bar.id] = f"| {' | '.join(map(str, [*cells, seed, commit]))} |"
    ordered = sorted(rows, key=bar_order)
    path.write_text(HEADER + "".join(rows[name] + "\n" for name in ordered))


def bar_order(name: str) -> tuple[str, int, str]:
    """Sort A2 before A10."""
    number = re.sub(r"\D", "", name)
    return name[0], int(number), name
