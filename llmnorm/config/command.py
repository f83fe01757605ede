"""Check a run file as training would, without training, and print it resolved."""

import argparse
import sys

from llmnorm.config.arguments import add_run_file
from llmnorm.config.load import load_run_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run file."""
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    """Print the resolved run file; errors are one line each."""
    sys.stdout.write(load_run_config(args.config, args.overrides).to_yaml())
    return 0
