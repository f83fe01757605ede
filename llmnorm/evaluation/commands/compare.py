"""Compare runs in one table, say what differs between them, and draw their losses."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from llmnorm.errors import ConfigError
from llmnorm.evaluation import records
from llmnorm.evaluation.commands.shared import replacing
from llmnorm.evaluation.compare import as_json, compare, markdown, plain, show
from llmnorm.evaluation.curves import draw_losses
from llmnorm.evaluation.runs import open_run

_PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument(
        "--format",
        choices=("auto", "table", "plain", "markdown", "json"),
        default="auto",
        help="auto: a table on a terminal, plain text elsewhere",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the losses to FILE (.png, .svg or .pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; draw the picture when asked."""
    if args.plot is not None and args.plot.suffix not in _PICTURES:
        raise ConfigError(f"--plot {args.plot}: expected a name ending in {', '.join(_PICTURES)}")
    if args.plot is not None:
        records.check_writable(args.plot)
    runs = [open_run(path) for path in args.runs]
    comparison = compare(runs)
    replacing(sys.stdout)
    console = Console()
    texts = {"plain": plain, "markdown": markdown, "json": lambda c: as_json(c) + "\n"}
    form = ("table" if console.is_terminal else "plain") if args.format == "auto" else args.format
    if form == "table":
        show(comparison, console)
    else:
        sys.stdout.write(texts[form](comparison))
    if args.plot is not None:
        draw_losses(runs, args.plot)
        sys.stderr.write(f"losses drawn in {args.plot}\n")
    return 0
