"""Give a trained model another norm: exactly by algebra, or by fitting and further training."""

import argparse
import importlib
from pathlib import Path

from llmnorm.evaluation.commands.shared import positive
from llmnorm.export.writing import DTYPES

CONVERSIONS = {
    "rmsnorm": ("llmnorm.export.exact", "layernorms of a Pre-LN model become rmsnorms; exact"),
    "crmsnorm": ("llmnorm.export.exact", "the same, stored one feature narrower; exact"),
    "none": ("llmnorm.export.exact", "norms that were removed or have faded are folded; exact"),
    "dyt": ("llmnorm.export.conversion.command", "norms become tanh, fitted on --data"),
    "derf": ("llmnorm.export.conversion.command", "norms become erf, fitted on --data"),
    "tapernorm": ("llmnorm.export.conversion.command", "rmsnorms that fade in --steps of training"),
    "fixed_std": ("llmnorm.export.conversion.command", "norms that go, one by one, in --steps"),
}
"""Name of a target -> the module that converts to it (`convert(args) -> int`), and what it does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `llmnorm convert`."""
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run or folder of an llmnorm model")
    parser.add_argument("--to", required=True, choices=CONVERSIONS, help="the norm to have")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights; auto: as saved"
    )
    further = parser.add_argument_group("targets that training makes good")
    further.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data to fit and measure on"
    )
    further.add_argument(
        "--tokens", type=positive, default=8192, metavar="N", help="to fit on (default 8192)"
    )
    further.add_argument(
        "--steps", type=positive, metavar="N", help="of the training that will follow"
    )
    further.add_argument(
        "--penalty",
        type=float,
        default=0.1,
        metavar="X",
        help="fixed_std: of the final norm's deviations, in the loss (default 0.1)",
    )
    further.add_argument(
        "--max-documents", type=positive, metavar="N", help="measure the loss on the first N only"
    )
    parser.epilog = "targets:\n" + "\n".join(
        f"  {name:<10} {what}" for name, (_, what) in CONVERSIONS.items()
    )


def run(args: argparse.Namespace) -> int:
    """Convert as the target's module does."""
    module = importlib.import_module(CONVERSIONS[args.to][0])
    code: int = module.convert(args)
    return code
