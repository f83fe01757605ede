"""The run file on a command line: its argument, its overrides, and the help on all its keys."""

import argparse
from collections.abc import Sequence

from pydantic_core import PydanticUndefined

from llmnorm.config.models import RunConfig
from llmnorm.config.problems import leaves, show


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """Declare the run file, by position or as --config, and list all its keys in --help.

    It arrives as `args.config` (None when not given), for `load_run_config`.
    """
    what = "run file: a path, or a recipe's name such as quickstart"
    parser.set_defaults(config=None)
    for flag, options in (("config", {"nargs": "?"}), ("--config", {"metavar": "CONFIG"})):
        parser.add_argument(flag, default=argparse.SUPPRESS, help=what, **options)  # type: ignore[arg-type]
    parser.epilog = describe_keys()


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into the rest and the overrides (flags with a dot in their name).

    >>> split_overrides(["run.yaml", "--optimizer.lr", "1e-3", "--debug"])
    (['run.yaml', '--debug'], ['--optimizer.lr', '1e-3'])
    """
    rest: list[str] = []
    overrides: list[str] = []
    waiting = False
    for word in words:
        flag, has_value, _ = word.partition("=")
        if word.startswith("--") and "." in flag:
            overrides.append(word)
            waiting = not has_value
        elif waiting and not word.startswith("--"):
            overrides.append(word)
            waiting = False
        else:
            rest.append(word)
            waiting = False
    return rest, overrides


def describe_keys() -> str:
    """Return two lines for each key of a run file: the flag, and its meaning with the default."""
    lines = ["run-file keys (in the file by section, here as --section.key VALUE):"]
    for path, field in leaves(RunConfig).items():
        default = field.get_default()
        shown = "required" if default is PydanticUndefined else f"default {show(default)}"
        lines.append(f"  --{'.'.join(map(str, path))}")
        lines.append(f"      {field.description} ({shown})")
    return "\n".join(lines)
