"""Show the norms, placements or presets there are, or the schemes and what is known of them."""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from llmnorm.build import build_config, source_of
from llmnorm.environment import parameter_counts
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, operation
from llmnorm.placements import PLACEMENTS, list_placements
from llmnorm.recipes.facts import (
    KINDS,
    REFERENCE,
    Choice,
    Entry,
    baseline_parameters,
    choices,
    named,
    operators,
    options_of,
    summary_of,
)
from llmnorm.resources import list_presets

# Of what is known of a scheme, in the order shown.
_HEADINGS = [
    *("what it is", "formula", "paper", "options", "init", "embedding", "final norm", "cost"),
    *("training", "known failure", "stock class", "not verified"),
]
_SHAPE = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to show."""
    parser.add_argument("what", choices=("norms", "placements", "presets", "schemes"))
    parser.add_argument("name", nargs="?", help="with schemes: the one to show in full")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    if args.name is not None and args.what != "schemes":
        raise ConfigError(f"llmnorm list {args.what} takes no name; saw {args.name!r}")
    if args.name is not None:
        shown = [_in_full(entry) for entry in named(args.name)]
    elif args.what == "schemes":
        shown = [_overview(kind, choices(kind)) for kind in KINDS]
        shown.append(_overview("operator", operators()))
    else:
        shown = [{"norms": _norms, "placements": _placements, "presets": _presets}[args.what]()]
    for table in shown:
        Console(markup=False).print(table)
    return 0


def count_parameters(config: LlmNormConfig) -> tuple[int, int]:
    """Return (all parameters, those outside embedding and head), without allocating them."""
    with torch.device("meta"):
        counts = parameter_counts(LlmNormForCausalLM(config))
    return counts["total"], counts["non_embedding"]


def known_facts(entry: Entry) -> dict[str, str]:
    """Everything known of a scheme or an operator, by headings; what is not known is left out."""
    facts = {"what it is": entry.summary, "paper": entry.source, "options": entry.options}
    if isinstance(entry, Choice):
        facts |= {"init": entry.init, "embedding": entry.embedding, "final norm": entry.final_norm}
        facts["cost"] = _cost(entry)
    if entry.recipe is not None:
        facts |= {
            "formula": entry.recipe.formula,
            "training": entry.recipe.training,
            "known failure": entry.recipe.failure,
            "stock class": entry.recipe.holder,
            "not verified": entry.recipe.provenance,
        }
    return {heading: facts[heading] for heading in _HEADINGS if facts.get(heading)}


def _cost(choice: Choice) -> str:
    share = choice.parameters / baseline_parameters()
    streams = f"; {choice.streams} residual streams" if choice.streams > 1 else ""
    return (
        f"{choice.parameters:+,} parameters ({share:+.3%}) and {choice.norms} norms "
        f"at {REFERENCE}{streams}"
    )


def _overview(kind: str, held: Sequence[Entry]) -> Table:
    what = f"parameters beyond those of pre_ln with rmsnorm at {REFERENCE}"
    if kind == "operator":
        what = "running statistics, for comparison alone: they stand in no model"
    table = Table(title=f"{kind}: {what}", title_justify="left")
    table.add_column(kind, no_wrap=True)
    table.add_column("formula")
    table.add_column("parameters", justify="right")
    table.add_column("stock class")
    for entry in held:
        recipe, extra = entry.recipe, entry.parameters if isinstance(entry, Choice) else None
        classes = recipe.classes if recipe else []
        table.add_row(
            entry.name,
            recipe.formula if recipe else "-",
            "-" if extra is None else f"{extra:+,}" if extra else "0",
            ", ".join(name.removesuffix("ForCausalLM") for name in classes) or "-",
        )
    return table


def _in_full(entry: Entry) -> Table:
    table = Table(title=f"{entry.kind} {entry.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for heading, fact in known_facts(entry).items():
        table.add_row(heading, fact)
    return table


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
        table.add_row(name, summary_of(cls), ", ".join(options_of(cls)) or "-", source_of(cls))
    return table
