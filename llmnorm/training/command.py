"""Train a model as a run file says.

A run directory that exists is continued; a finished one says so. Exit codes: 0 finished, 2 the
configuration, 3 the machine, 4 the data, 5 a checkpoint, 6 the loss was not finite, 75 stopped by
a signal after saving (start it again to continue).
"""

import argparse

from llmnorm.config import add_run_file, load_run_config
from llmnorm.errors import ConfigError
from llmnorm.training.launch import launch, own_command
from llmnorm.training.loop import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run file, and how many processes to start."""
    add_run_file(parser)
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="start N processes here and keep their exit code (for several machines, or from a "
        "file of configs/accelerate, use accelerate launch)",
    )


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code.

    Raises:
        ConfigError: if fewer than one process is asked for.
    """
    config = load_run_config(args.config, args.overrides)
    if args.processes is None:
        return train(config)
    if args.processes < 1:
        raise ConfigError(f"--processes is {args.processes}; expected 1 or more")
    words = [*([args.config] if args.config else []), *args.overrides]
    return launch(own_command(words), args.processes)
