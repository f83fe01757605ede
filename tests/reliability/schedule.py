"""A run of many bars: two workers at once, one line a bar, the sum and the exit code."""

import json
import os
import selectors
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reliability.harness import SEED, Bar, choose
from reliability.results import ROOT, TABLE, Progress, Tally, commit, write_table
from reliability.server import kill_descendants, serve

MOST_SKIPPED = {"ci": 20, "nightly": 200}
"""More skipped trials than these fail a run: it must not pass by skipping."""


class Run:
    """One call of this program.

    Args:
        tier: ci or nightly.
        seed: see `Trial`.
        work: folder in which trials live.
        jobs: how many bars run at once.
    """

    def __init__(self, tier: str, seed: int, work: Path, jobs: int) -> None:
        self.tier = tier
        self.seed = seed
        self.work = work
        self.jobs = jobs
        self.shown_commit, self.key = commit()
        self.progress = Progress(ROOT / ".reliability", f"{self.key}-{seed}")
        self.tallies: dict[str, Tally] = {}

    def go(self, bars: Sequence[Bar]) -> int:
        """Run all bars, print what became of them, return the exit code."""
        begun = time.monotonic()
        say(f"commit {self.shown_commit}, seed {self.seed}, tier {self.tier}, {len(bars)} bars")
        waiting = groups(bars)
        for bar in bars:
            self.tallies[bar.id] = Tally(bar)
            if self.tier == "nightly":
                self.tallies[bar.id].attempts.update(self.progress.load(bar.id))
        running = selectors.DefaultSelector()
        while waiting or running.get_map():
            while waiting and len(running.get_map()) < self.jobs:
                group = waiting.pop(0)
                pipe, child = self.start(group)
                running.register(pipe, selectors.EVENT_READ, (group, child, bytearray()))
            for key, _ in running.select():
                group, child, buffer = key.data
                if chunk := os.read(key.fd, 65_536):
                    buffer += chunk
                    *lines, rest = bytes(buffer).split(b"\n")
                    buffer[:] = rest
                    for line in lines:
                        self.take(json.loads(line))
                else:
                    running.unregister(key.fd)
                    os.close(key.fd)
                    self.end(group, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return self.judge(time.monotonic() - begun)

    def start(self, group: Sequence[Bar]) -> tuple[int, int]:
        """Fork a worker; return what to read from and its process."""
        read, write = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            return read, child
        code = 1
        try:
            with open(write, "w") as pipe:
                os.close(read)

                def send(message: dict[str, Any]) -> None:
                    print(json.dumps(message), file=pipe, flush=True)

                serve(group, self.work, self.seed, self.chosen, send)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            kill_descendants()
            os._exit(code)

    def chosen(self, bar: Bar, total: int) -> list[int]:
        """The trials of a bar that are still to run."""
        if self.tier == "ci":
            return choose(total, bar.ci, f"{self.key} {bar.id}")
        return [index for index in range(total) if index not in self.tallies[bar.id].attempts]

    def take(self, message: dict[str, Any]) -> None:
        """Note what a worker says."""
        tally = self.tallies[message["bar"]]
        if "trials" in message:
            tally.trials = len(tally.attempts) + message["trials"]
        elif "done" in message:
            tally.finished = True
            say(line(tally))
        else:
            tally.attempts[message["index"]] = message
            if self.tier == "nightly":
                self.progress.add(message)
            if message["verdict"] == "failed":
                say(self.failure(message))

    def failure(self, message: dict[str, Any]) -> str:
        """One line on a failed trial."""
        trial = f"{message['bar']}:{message['index']}"
        seed = "" if self.seed == SEED else f" SEED={self.seed}"
        kept = self.work / message["bar"] / str(message["index"])
        return f"{trial} failed: {message['detail']} ({kept}.log); make replay TRIAL={trial}{seed}"

    def end(self, group: Sequence[Bar], code: int) -> None:
        """Speak of bars that the worker did not finish."""
        for bar in group:
            if not self.tallies[bar.id].finished:
                say(f"{bar.id} failed: its worker ended with {code} before the bar was done")

    def judge(self, seconds: float) -> int:
        """Print the sum, keep the results of a nightly run, return the exit code."""
        tallies = list(self.tallies.values())
        skipped = sum(tally.count("skipped") for tally in tallies)
        wrong = [tally.bar.id for tally in tallies if not tally.sound]
        if self.tier == "nightly":
            whole = [tally for tally in tallies if tally.finished]
            write_table(TABLE, whole, seed=self.seed, commit=self.shown_commit)
            self.progress.forget(tally.bar.id for tally in whole)
        if skipped > MOST_SKIPPED[self.tier]:
            wrong.append(f"{skipped} trials skipped, more than {MOST_SKIPPED[self.tier]}")
        tried, passed = sum(t.tried for t in tallies), sum(t.count("passed") for t in tallies)
        verdict = f"FAILED: {', '.join(wrong)}" if wrong else "all bars hold"
        say(f"{passed}/{tried} trials passed, {skipped} skipped, {seconds:.0f} s; {verdict}")
        return 1 if wrong else 0


def line(tally: Tally) -> str:
    """One line on a bar: how many of its trials passed, and what they ran."""
    ran = f" [{tally.ran}]" if tally.ran else ""
    skipped = f", {tally.count('skipped')} skipped" if tally.count("skipped") else ""
    counts = f"{tally.count('passed')}/{tally.tried} passed{skipped}, {tally.seconds:.1f} s"
    return f"{tally.bar.id:<4} {tally.bar.what}: {counts}{ran}"


def groups(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars of one area that share a `prepare` run in one worker, one after the other."""
    found: dict[Any, list[Bar]] = {}
    for bar in bars:
        found.setdefault((bar.area, bar.prepare) if bar.prepare else bar.id, []).append(bar)
    return list(found.values())


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)  # noqa: T201


def replay(bar: Bar, index: int, seed: int, work: Path) -> int:
    """Run one trial in this process, with its output on the terminal; a failed one's folder stays.

    Returns:
        0 when it passed, else 1.
    """
    verdicts = []

    def tell(message: dict[str, Any]) -> None:
        if "verdict" in message:
            verdicts.append(message["verdict"])
            ran = f" [{', '.join(message['notes'])}]" if message["notes"] else ""
            say(f"{bar.id}:{index} {message['verdict']}{ran} {message['detail']}".rstrip())

    serve([bar], work, seed, lambda *_: [index], tell, show=True)
    if verdicts != ["passed"]:
        say(f"folder: {work / bar.id / str(index)}")
    return 0 if verdicts == ["passed"] else 1
