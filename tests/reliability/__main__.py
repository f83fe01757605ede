"""Runs the bars: `python -m reliability --tier ci`, `--tier nightly --areas A B`, `--trial A1:17`.

Prints one line a bar, and for each failed trial the command that runs it again. Exit code 1 when a
trial failed, a bar could not be run to its end, or too much was skipped.
"""

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from reliability.harness import BARS, SEED, Bar
from reliability.results import bar_order
from reliability.schedule import Run, replay, say
from reliability.server import adopt_orphans, kill_descendants


def load_areas(letters: Sequence[str]) -> list[Bar]:
    """Import the areas' files (all of them without letters) and return their bars in order."""
    for path in sorted(Path(__file__).parent.glob("area_*.py")):
        if not letters or path.stem.split("_")[1].upper() in letters:
            importlib.import_module(f"reliability.{path.stem}")
    bars = [BARS[name] for name in sorted(BARS, key=bar_order)]
    return [bar for bar in bars if not letters or bar.area in letters]  # areas import each other


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__, allow_abbrev=False)
    parser.add_argument("--tier", choices=("ci", "nightly"), default="ci")
    parser.add_argument("--areas", nargs="*", default=[], help="letters; all without it")
    parser.add_argument("--trial", metavar="BAR:INDEX", help="run this trial alone, with output")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2, help="bars run at once")
    args = parser.parse_args()
    name, _, index = (args.trial or "").partition(":")
    letters = [name[0]] if name else args.areas
    bars = [bar for bar in load_areas(letters) if not name or bar.id == name]
    if not bars or {bar.area for bar in bars} < set(letters):
        parser.error(f"no bar is named {args.trial or letters}")
    from reliability.runs import warm_up  # imports torch: only now, after --help

    work = Path(tempfile.mkdtemp(prefix="reliability-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(work)  # what trials forget goes with it
    code = 130
    adopt_orphans()
    try:
        warm_up()
        if name:
            code = replay(bars[0], int(index), args.seed, work)
        else:
            bars = [bar for bar in bars if bar.ci or args.tier == "nightly"]
            code = Run(args.tier, args.seed, work, args.jobs).go(bars)
    except KeyboardInterrupt:
        say("interrupted; a nightly run that is started again goes on where it was")
    finally:
        kill_descendants()
        if code != 1:
            shutil.rmtree(work, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
