"""The `llmnorm` command: a thin dispatcher. Each command lives with its subject.

A command's module is imported when the command is chosen. It offers `add_arguments(parser)` and
`run(args) -> int`; words of the form `--section.key VALUE` reach it as the list `args.overrides`.
`run_main` and `run_command` are shared with the scripts of train/ and eval/.
"""

import argparse
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NoReturn, Protocol

from llmnorm.config import split_overrides
from llmnorm.config.problems import one_line
from llmnorm.errors import ConfigError, LlmNormError
from llmnorm.processes import leave
from llmnorm.resources import suggest

_GRACE_SECONDS = 5.0  # how long the other ranks let rank 0 speak first
_LONGEST_RECORD = 2000  # characters
_EXIT_INTERRUPTED = 130  # 128 + SIGINT
_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_COMMANDS = {
    "data": ("llmnorm.data.command", "prepare text as token shards"),
    "train": ("llmnorm.training.command", "train a model as a run file says"),
    "eval": ("llmnorm.evaluation.command", "score a model: perplexity, lm-eval tasks"),
    "generate": ("llmnorm.evaluation.commands.generate", "continue a text with a model"),
    "compare": ("llmnorm.evaluation.commands.compare", "compare runs: table, picture"),
    "import": ("llmnorm.export.importing", "turn a stock model into one of llmnorm"),
    "convert": ("llmnorm.export.convert", "give a model another norm"),
    "export": ("llmnorm.export.command", "turn a model into a stock class, exactly"),
    "list": ("llmnorm.listing", "show the schemes, norms, placements or presets there are"),
    "verify": ("llmnorm.verify", "prove that a run of yours continues exactly after a stop"),
    "validate": ("llmnorm.planning.command", "check what a run needs: files, memory, disk, time"),
    "doctor": ("llmnorm.doctor", "look at this machine: versions, devices, engines, disk, network"),
}


class Command(Protocol):
    """What the module of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int | None:
        """Do the work and return the exit code."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one-line ConfigErrors; no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def main() -> NoReturn:
    """Entry point of the `llmnorm` command."""
    run_main(_dispatch)


def run_main(fn: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `fn(words)` on the command line's words and exit with its code (None is 0).

    Errors of ours are printed alone, one line each, and give their own exit code; `--debug` (taken
    out of the words) prints the traceback as well. Ctrl-C and a closed pipe end without one.
    Under a launcher rank 0 speaks first; another rank speaks only if that did not end it.
    """
    words = [word for word in sys.argv[1:] if word != "--debug"]
    for closed in (name for name in ("stdout", "stderr") if getattr(sys, name) is None):
        setattr(sys, closed, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    _set_up_logging()
    try:
        code = fn(words) or 0
        sys.stdout.flush()
    except LlmNormError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _report(error)
        code = error.exit_code
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = _EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _EXIT_BROKEN_PIPE
    leave(code)


def run_command(command: Command, prog: str, words: list[str]) -> int:
    """Parse `words` as `command` declares and run it.

    Args:
        command: a module with `add_arguments(parser)` and `run(args)`. Only one that declares
            `llmnorm.config.add_run_file(parser)` takes overrides; they arrive as `args.overrides`.
        prog: how the user called it, such as `llmnorm train` or `train/pretrain.py`.
        words: the words after that name.

    Raises:
        ConfigError: for words that the command does not know.
    """
    parser = Parser(prog=prog, description=command.__doc__)
    command.add_arguments(parser)
    reads_run_file = any(action.dest == "config" for action in parser._actions)
    rest, overrides = split_overrides(words)
    args, unknown = parser.parse_known_args(rest)
    args.overrides = overrides + unknown
    if args.overrides and not reads_run_file:
        parser.error(f"unrecognized arguments: {' '.join(args.overrides)}")
    return command.run(args) or 0


def _dispatch(words: list[str]) -> int:
    """Find the command that the first word names and run it."""
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"llmnorm {version('llmnorm')}\n")
        return 0
    if words[0] not in _COMMANDS:
        raise ConfigError(f"no command is named {words[0]!r}{suggest(words[0], list(_COMMANDS))}")
    command = importlib.import_module(_COMMANDS[words[0]][0])
    return run_command(command, f"llmnorm {words[0]}", words[1:])


def _usage() -> str:
    commands = "\n".join(f"  {name:<10} {what}" for name, (_, what) in _COMMANDS.items())
    return (
        "usage: llmnorm COMMAND [arguments]\n\n"
        "Train decoder-only language models with the normalization scheme as a choice.\n\n"
        f"commands (llmnorm COMMAND --help says more):\n{commands}\n\n"
        "  --version  print the version\n  --debug    print a traceback with every error\n"
    )


def _report(error: LlmNormError) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = ""
    if rank != "0":
        if not error.settled:
            time.sleep(_GRACE_SECONDS)  # the launcher ends this process when rank 0 failed too
        prefix = "" if str(error).startswith(f"rank {rank} ") else f"[rank {rank}] "
    text = str(error) or type(error).__name__
    for line in text.split("\n") if isinstance(error, ConfigError) else [text]:
        sys.stderr.write(one_line(prefix + line) + "\n")
    sys.stderr.flush()


class _Formatter(logging.Formatter):
    """Plain text for what is expected, the level's name before what is not; one line a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return one_line(super().formatMessage(record), _LONGEST_RECORD)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _set_up_logging() -> None:
    """Show our log records on standard error: all on rank 0, errors alone on other ranks."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    ours = logging.getLogger("llmnorm")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    # Where DeepSpeed is installed transformers imports it, and it remarks on every CPU.
    remark = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: remark not in record.getMessage())
