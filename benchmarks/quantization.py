"""What int8 weights cost each scheme: validation loss of trained runs before and after torchao.

    pip install 'llmnorm[torchao]'
    python benchmarks/quantization.py runs/quickstart/*-*

The matrices of the blocks become int8 with one scale a row (Int8WeightOnlyConfig); embedding, head
and norms stay float32, and nothing is calibrated. Scored are the first `--documents` documents of
the validation split. Beside the losses stands how far the matrices moved, relative to their length.
One seed a scheme: this says whether int8 is safe, it ranks nobody.
"""

import argparse
from pathlib import Path

import torch
from record import write_result
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from llmnorm.environment import versions
from llmnorm.evaluation.loading import load
from llmnorm.evaluation.measure import measure_perplexity
from llmnorm.evaluation.runs import open_run


def in_block(module: nn.Module, name: str) -> bool:
    """Whether a module is a projection inside a block."""
    return isinstance(module, nn.Linear) and ".layers." in name


def measure(run: Path, data: Path, documents: int) -> dict[str, float | str]:
    """Losses in nats per token in float32 and with int8 matrices, and how far these moved."""
    loaded = load(str(run), dtype="fp32")
    before = measure_perplexity(loaded, data, max_documents=documents).record["loss"]
    names = [name for name, module in loaded.model.named_modules() if in_block(module, name)]
    whole = {name: loaded.model.get_submodule(name).weight.detach().clone() for name in names}
    quantize_(loaded.model, Int8WeightOnlyConfig(version=2), filter_fn=in_block)
    held = {name: loaded.model.get_submodule(name).weight.dequantize() for name in names}
    moved = torch.stack([(held[n] - whole[n]).norm() / whole[n].norm() for n in names])
    after = measure_perplexity(loaded, data, max_documents=documents).record["loss"]
    return {
        "scheme": open_run(run).scheme,
        "loss_float32": before,
        "loss_int8": after,
        "difference": after - before,
        "matrices": len(names),
        "moved_mean": moved.mean().item(),
        "moved_most": moved.max().item(),
    }


def main() -> None:
    """Measure every run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs")
    parser.add_argument("--data", type=Path, default=Path("data/python-stdlib"))
    parser.add_argument("--documents", type=int, default=10, help="validation documents scored")
    args = parser.parse_args()
    rows = [measure(run, args.data, args.documents) for run in args.runs]
    most = max(rows, key=lambda row: abs(row["difference"]))
    headline = (
        f"int8 weights move the loss of {len(rows)} schemes by at most "
        f"{abs(most['difference']):.5f} nats ({most['scheme']}, of {most['loss_float32']:.3f})"
    )
    figures = {"documents": args.documents, "torchao": versions("torchao")["torchao"], "runs": rows}
    path = write_result("quantization", headline, figures)
    for row in rows:
        losses = f"{row['loss_float32']:8.4f} {row['loss_int8']:8.4f} {row['difference']:+9.5f}"
        print(f"{row['scheme']:40} {losses} {row['moved_mean']:8.4f}")  # noqa: T201
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
