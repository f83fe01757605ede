"""Train a model as a run file says.

A run directory that exists is continued; a finished one says so. Exit codes: 0 finished, 2 the
configuration, 3 the machine, 4 the data, 5 a checkpoint, 6 the loss was not finite, 75 stopped by
a signal after saving (start it again to continue).
"""

import argparse

from llmnorm.config import add_run_file, load_run_config
from llmnorm.training.loop import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run file."""
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    return train(load_run_config(args.config, args.overrides))
