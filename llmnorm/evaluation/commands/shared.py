"""What every evaluation command line has: how to name a model, and the processes that score it."""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from llmnorm.evaluation import records
from llmnorm.evaluation.loading import DTYPES, Loaded, load
from llmnorm.evaluation.measure import Measurement
from llmnorm.processes import leave_process_group


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` started, its device and its stdout."""

    rank: int
    world: int
    device: torch.device
    stdout: TextIO


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for loading a model: precision, tokenizer, trust."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision to load in (auto: as saved)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_NAME", help="for models that come without a tokenizer"
    )
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="end-of-text token, where the tokenizer names none"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run model code found in the folder (not needed for llmnorm's own models)",
    )


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both scoring commands: model, window, batch, output."""
    parser.add_argument(
        "--model", required=True, metavar="RUN_OR_FOLDER", help="run, Hugging Face folder or name"
    )
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="N",
        help="longest input in tokens (default: as the run trained, else the model's positions;"
        " perplexity: at most 2048)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the JSON here (default: the run's eval/)"
    )
    add_model_arguments(parser)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def load_model(args: argparse.Namespace, device: torch.device) -> Loaded:
    """Load `args.model` as the options of `add_model_arguments` say."""
    return load(
        args.model,
        dtype=args.dtype,
        device=device,
        tokenizer=args.tokenizer,
        eos_token=args.eos_token,
        trust_remote_code=args.trust_remote_code,
    )


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the launcher's processes, if any, and leave them at the end; stdout is kept clean."""
    from accelerate import PartialState

    stdout = replacing(sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        state = PartialState(cpu=not torch.accelerator.is_available())
        try:
            yield Processes(state.process_index, state.num_processes, state.device, stdout)
        finally:
            leave_process_group()


def replacing(stream: TextIO) -> TextIO:
    """Let a stream write `?` for what its encoding lacks, rather than fail."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def run_scoring(
    args: argparse.Namespace,
    measure: Callable[..., Measurement | None],
    what: Path | Sequence[str],
    **options: Any,
) -> int:
    """Load the model, call `measure(loaded, what, **options)` on every process, publish the record.

    `measure` also gets what `add_scoring_arguments` declares and this process's rank and world.
    """
    with processes() as process:
        loaded = load_model(args, process.device)
        check_output(loaded, process, out=args.out)
        measured = measure(
            loaded,
            what,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            rank=process.rank,
            world=process.world,
            **options,
        )
        publish(measured, loaded, process, out=args.out)
    return 0


def check_output(loaded: Loaded, processes: Processes, *, out: Path | None) -> None:
    """On rank 0, fail before scoring when the record could not be written."""
    if processes.rank != 0:
        return
    if out is not None:
        records.check_writable(out)
    elif loaded.source.run is not None:
        records.check_writable(loaded.source.run / "eval" / "record.json")


def publish(
    measured: Measurement | None, loaded: Loaded, processes: Processes, *, out: Path | None
) -> None:
    """On rank 0, print the record to stdout as one JSON, then write it to its file."""
    if processes.rank == 0 and measured is not None:
        processes.stdout.write(records.to_json(measured.record) + "\n")
        processes.stdout.flush()
        measured.write(loaded, out)
