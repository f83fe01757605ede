"""Score a causal language model on documents: exact loss, perplexity, bits per byte."""

import argparse
from pathlib import Path

from llmnorm.evaluation.commands.shared import add_scoring_arguments, positive, run_scoring
from llmnorm.evaluation.measure import measure_perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm eval perplexity`."""
    add_scoring_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="PATH",
        help="prepared folder, or text or jsonl (.gz, .xz, .zst); text is tokenized for the model",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens between the starts of two windows (default: seq-len, no overlap)",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of a prepared folder: val (default), train"
    )
    parser.add_argument("--text-column", default="text", help="jsonl field (default: text)")
    parser.add_argument("--max-documents", type=positive, metavar="N", help="only the first N")


def run(args: argparse.Namespace) -> int:
    """Score, and print one JSON."""
    return run_scoring(
        args,
        measure_perplexity,
        args.data,
        split=args.split,
        text_column=args.text_column,
        max_documents=args.max_documents,
        stride=args.stride,
    )
