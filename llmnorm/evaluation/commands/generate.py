"""Continue a text with a model, and print prompt and continuation."""

import argparse

from llmnorm.evaluation.commands.shared import (
    add_model_arguments,
    load_model,
    positive,
    processes,
)
from llmnorm.evaluation.generate import continue_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm generate`."""
    parser.add_argument(
        "model", metavar="MODEL", help="run, Hugging Face folder or name of a causal model"
    )
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="may be empty")
    parser.add_argument("--max-new-tokens", type=positive, default=100, help="default 100")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default 1")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default 0")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print prompt and continuation."""
    with processes() as process:
        loaded = load_model(args, process.device)
        continuation = continue_text(
            loaded,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        process.stdout.write(f"{args.prompt}{continuation}\n")
    return 0
