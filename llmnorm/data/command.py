"""`llmnorm data prepare`: text or tokens to a prepared folder."""

import argparse
import logging
import sys
from pathlib import Path

from ..errors import ConfigError
from .prepare import DEFAULT_VOCAB_SIZE, PrepareOptions, prepare
from .prepared import Prepared
from .sources import Jsonl, PythonStdlib, Source, Text

logger = logging.getLogger(__name__)
KINDS = ("python-stdlib", "text", "jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `llmnorm data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "prepare",
        help="turn text into token shards",
        description="Turn text into a folder of token shards. An interrupted run of the same "
        "command continues; a finished folder is never overwritten.",
    )
    one.add_argument("--source", required=True, choices=KINDS, help="where documents come from")
    one.add_argument("--path", help="file or folder")
    one.add_argument("--out", required=True, type=Path, help="the folder to make")
    one.add_argument("--tokenizer", help="folder, tokenizer.json or hub name (default: train one)")
    one.add_argument("--vocab-size", type=int, help=f"of a trained one ({DEFAULT_VOCAB_SIZE})")
    one.add_argument("--document", choices=("blank-line", "file"), default="blank-line")
    one.add_argument("--text-column", default="text", help="field that holds the text")
    one.add_argument("--glob", help="which files of a folder")
    one.add_argument("--val-fraction", type=float, default=PrepareOptions.val_fraction)
    one.add_argument("--max-tokens", type=int)
    one.add_argument("--shard-tokens", type=int, default=PrepareOptions.shard_tokens)
    one.add_argument("--restart", action="store_true", help="drop unfinished work")


def run(args: argparse.Namespace) -> int:
    """Run a subcommand; the exit code."""
    options = PrepareOptions(
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        max_tokens=args.max_tokens,
        shard_tokens=args.shard_tokens,
    )
    prepared = prepare(_source(args), args.out, options, restart=args.restart)
    sys.stdout.write(_summary(prepared))
    return 0


def _source(args: argparse.Namespace) -> Source:
    if args.source == "python-stdlib":
        return PythonStdlib()
    if args.path is None:
        raise ConfigError(f"--source {args.source} needs --path")
    path = Path(args.path)
    if args.source == "text":
        return Text(path, args.glob, whole_files=args.document == "file")
    return Jsonl(path, args.glob, text_column=args.text_column)


def _summary(prepared: Prepared) -> str:
    manifest = prepared.manifest
    lines = [f"{prepared.path}: {manifest.corpus}, vocabulary {prepared.vocab_size:,}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.utf8_bytes:,} bytes of text"
        )
    if manifest.skipped_documents:
        lines.append(f"  skipped {manifest.skipped_documents:,} documents without text")
    return "\n".join(lines) + "\n"
