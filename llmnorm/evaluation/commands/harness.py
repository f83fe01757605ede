"""Score a causal language model on lm-eval tasks, each beside its chance level."""

import argparse
from pathlib import Path

from llmnorm.errors import ConfigError
from llmnorm.evaluation.commands.shared import add_scoring_arguments, positive, run_scoring
from llmnorm.evaluation.measure import measure_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm eval harness`."""
    add_scoring_arguments(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="tasks, groups or tags, comma-separated"
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder of task files of your own"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N documents of each task"
    )


def run(args: argparse.Namespace) -> int:
    """Score, and print one JSON."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task; expected for example --tasks blimp,arc_easy")
    return run_scoring(args, measure_tasks, names, include_path=args.include_path, limit=args.limit)
