"""Score a model: perplexity, lm-eval tasks."""

import argparse

from llmnorm.evaluation.commands import harness, perplexity

_COMMANDS = {"perplexity": perplexity, "harness": harness}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand per measure."""
    subparsers = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name, module in _COMMANDS.items():
        what = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(subparsers.add_parser(name, help=what, description=what))


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand."""
    return _COMMANDS[args.measure].run(args)
