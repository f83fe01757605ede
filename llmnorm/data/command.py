"""`llmnorm data`: prepare token shards from text or tokens, write an lm-eval task from them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError, DataError
from .foreign import Megatron, NanoGpt, Olmo, TokenSource
from .options import DEFAULT_VOCAB_SIZE, PrepareOptions
from .prepare import prepare
from .prepared import Prepared, open_prepared
from .sources import Jsonl, PythonStdlib, Source, Text
from .tables import HubDataset, Parquet
from .task import task_name, write_task
from .tokenizer import load_tokenizer

_DEFAULTS = PrepareOptions()
_PREPARE = """\
Turn text, or tokens that another tool made, into a folder of token shards. The same command
continues an interrupted run. A finished folder is never overwritten.

sources:
  python-stdlib  the standard library of this Python, without its tests
  text           .txt files, plain or .gz, .xz, .zst; a byte order mark is dropped, CRLF becomes LF
  jsonl          one JSON object a line, plain or compressed
  parquet        one row a document
  hf             --path NAME: a dataset of the Hugging Face hub, or a local one, by `datasets`
  nanogpt        .bin of nanoGPT or llm.c          } with --tokenizer, the one
  megatron       .bin with its .idx                } the tokens were made with
  olmo           .npy of OLMo (bare numbers)       }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of `llmnorm data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "prepare",
        help="turn text into token shards",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = one.add_argument
    add("--source", required=True, choices=sorted(SOURCES), help="where documents come from")
    add("--path", help="file or folder; the name of a dataset with --source hf")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--tokenizer", help="folder, tokenizer.json or hub name (default: train byte-level BPE)")
    add("--vocab-size", type=int, help=f"of a trained one (default: {DEFAULT_VOCAB_SIZE})")
    add("--val-fraction", type=float, default=_DEFAULTS.val_fraction, help="(%(default)s)")
    add("--max-tokens", type=int, help="stop before the document that would pass this number")
    add("--shard-tokens", type=int, default=_DEFAULTS.shard_tokens, help="(%(default)s)")
    add("--write-task", action="store_true", help="also write an lm-eval task, see `data task`")
    add("--restart", action="store_true", help="drop what an unfinished run left")
    _add_source_arguments(one)
    task = commands.add_parser("task", help="write an lm-eval task from the validation split")
    task.add_argument("folder", type=Path, help="a prepared folder")
    task.add_argument("--items", type=int, default=200, help="questions (%(default)s)")


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only some sources take; None means not given."""
    add = parser.add_argument
    add("--glob", help="files: which ones of a folder, such as '*.md'")
    add("--document", choices=("blank-line", "file"), help="text: what ends one (blank-line)")
    add("--text-column", help="jsonl, parquet, hf: the field that holds the text (text)")
    add("--subset", help="hf: configuration of the dataset")
    add("--split", help="hf: rows to take (train)")
    add("--revision", help="hf: branch, tag or commit")
    add("--streaming", action="store_true", default=None, help="hf: do not download it first")
    add("--token-dtype", choices=("uint16", "uint32"), help="nanogpt, olmo: type of bare numbers")


def run(args: argparse.Namespace) -> int:
    """Run a subcommand; the exit code."""
    if args.data_command == "task":
        if args.items < 1:
            raise ConfigError(f"--items {args.items} is not a positive number")
        sys.stdout.write(_write_task(open_prepared(args.folder), args.items))
        return 0
    options = PrepareOptions(
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        max_tokens=args.max_tokens,
        shard_tokens=args.shard_tokens,
    )
    prepared = prepare(open_source(args), args.out, options, restart=args.restart)
    sys.stdout.write(_summary(prepared))
    if args.write_task:
        sys.stdout.write(_write_task(prepared, items=200))
    return 0


def open_source(args: argparse.Namespace) -> Source:
    """The source that the arguments name.

    Raises:
        ConfigError: an argument is missing, or one that this source does not take is given.
        DataError: the input is missing.
    """
    make, taken = SOURCES[args.source]
    every = {name for _, names in SOURCES.values() for name in names}
    for name in sorted(every - taken):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} means nothing with --source {args.source}; leave it out")
    if "path" in taken and args.path is None:
        raise ConfigError(f"--source {args.source} needs --path; see llmnorm data prepare --help")
    try:
        return make(args)
    except OSError as error:
        raise DataError(f"{args.path} cannot be read: {error.strerror or error}") from None


def _text(args: argparse.Namespace) -> Source:
    return Text(Path(args.path), args.glob, whole_files=args.document == "file")


def _jsonl(args: argparse.Namespace) -> Source:
    return Jsonl(Path(args.path), args.glob, text_column=args.text_column or "text")


def _parquet(args: argparse.Namespace) -> Source:
    return Parquet(Path(args.path), args.glob, text_column=args.text_column or "text")


def _hub(args: argparse.Namespace) -> Source:
    return HubDataset(
        args.path,
        subset=args.subset,
        split=args.split or "train",
        text_column=args.text_column or "text",
        streaming=bool(args.streaming),
        revision=args.revision,
    )


def _tokens(kind: type[TokenSource]) -> Callable[[argparse.Namespace], Source]:
    def make(args: argparse.Namespace) -> Source:
        if args.tokenizer is None:
            raise ConfigError(
                f"--source {args.source} holds token ids: give the --tokenizer they were made with"
            )
        tokenizer = load_tokenizer(args.tokenizer)
        return kind(
            Path(args.path),
            args.glob,
            eos_token_id=int(tokenizer.eos_token_id),
            vocab_size=len(tokenizer),
            dtype=args.token_dtype,
        )

    return make


# Name on the command line: how to open it, and which of the sources' arguments it takes.
SOURCES: dict[str, tuple[Callable[[argparse.Namespace], Source], frozenset[str]]] = {
    "python-stdlib": (lambda args: PythonStdlib(), frozenset()),
    "text": (_text, frozenset({"path", "glob", "document"})),
    "jsonl": (_jsonl, frozenset({"path", "glob", "text_column"})),
    "parquet": (_parquet, frozenset({"path", "glob", "text_column"})),
    "hf": (
        _hub,
        frozenset({"path", "subset", "split", "revision", "streaming", "text_column"}),
    ),
    "nanogpt": (_tokens(NanoGpt), frozenset({"path", "glob", "token_dtype"})),
    "megatron": (_tokens(Megatron), frozenset({"path", "glob"})),
    "olmo": (_tokens(Olmo), frozenset({"path", "glob", "token_dtype"})),
}


def _write_task(prepared: Prepared, items: int) -> str:
    folder = write_task(prepared, items)
    return f"lm-eval task {task_name(prepared)}, include path {folder}\n"


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
