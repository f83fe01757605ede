"""Show the norms, placements or presets there are."""

import argparse
import inspect

import torch
from rich.console import Console
from rich.table import Table

from llmnorm.build import build_config, source_of
from llmnorm.environment import parameter_counts
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, operation
from llmnorm.placements import PLACEMENTS, list_placements
from llmnorm.resources import list_presets

_SHAPE = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to show."""
    parser.add_argument("what", choices=("norms", "placements", "presets"))


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    tables = {"norms": _norms, "placements": _placements, "presets": _presets}
    Console().print(tables[args.what]())
    return 0


def count_parameters(config: LlmNormConfig) -> tuple[int, int]:
    """Return (all parameters, those outside embedding and head), without allocating them."""
    with torch.device("meta"):
        counts = parameter_counts(LlmNormForCausalLM(config))
    return counts["total"], counts["non_embedding"]


def _presets() -> Table:
    table = Table(title="presets: models/NAME/config.json, counted with pre_ln and rmsnorm")
    table.add_column("preset")
    for heading in ("parameters", "non-embedding", *_SHAPE):
        table.add_column(heading, justify="right", overflow="fold")
    for name in list_presets():
        config = build_config(name)
        counts = (f"{count / 1e6:,.2f} M" for count in count_parameters(config))
        table.add_row(name, *counts, *(str(getattr(config, field)) for field in _SHAPE.values()))
    return table


def _norms() -> Table:
    return _described("norm", {name: operation(name) for name in list_norms()})


def _placements() -> Table:
    return _described("placement", {name: PLACEMENTS[name] for name in list_placements()})


def _described(kind: str, classes: dict[str, type]) -> Table:
    """One row for each class: what it is, and the options that a run file may give."""
    table = Table(kind, "what it is", "options", "source")
    for name, cls in classes.items():
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        options = inspect.signature(cls).parameters.values()
        shown = [option.name for option in options if option.default is not option.empty]
        table.add_row(name, summary, ", ".join(shown) or "-", source_of(cls))
    return table
