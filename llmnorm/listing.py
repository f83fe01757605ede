"""Show the norms, placements or presets there are, or the schemes and what is known of them."""

import argparse
import inspect

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
from llmnorm.recipes.facts import KINDS, REFERENCE, Scheme, baseline_parameters, scheme, schemes
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
    parser.add_argument("what", choices=("norms", "placements", "presets", "schemes"))
    parser.add_argument("name", nargs="?", help="with schemes: the one to show in full")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    if args.name is not None and args.what != "schemes":
        raise ConfigError(f"llmnorm list {args.what} takes no name; saw {args.name!r}")
    if args.name is not None:
        shown = [_in_full(scheme(args.name))]
    elif args.what == "schemes":
        shown = [_recipes(kind) for kind in KINDS]
    else:
        shown = [{"norms": _norms, "placements": _placements, "presets": _presets}[args.what]()]
    for table in shown:
        Console().print(table)
    return 0


def count_parameters(config: LlmNormConfig) -> tuple[int, int]:
    """Return (all parameters, those outside embedding and head), without allocating them."""
    with torch.device("meta"):
        counts = parameter_counts(LlmNormForCausalLM(config))
    return counts["total"], counts["non_embedding"]


def known_facts(scheme: Scheme) -> dict[str, str]:
    """Everything known of a scheme, by headings; what is not known is left out."""
    recipe = scheme.recipe
    facts = {
        "what it is": scheme.summary,
        "formula": recipe and recipe.formula,
        "paper": scheme.source,
        "options": scheme.options,
        "init": scheme.init,
        "embedding": scheme.embedding,
        "final norm": scheme.final_norm,
        "cost": _cost(scheme),
        "training": recipe and recipe.training,
        "known failure": recipe and recipe.failure,
        "stock class": recipe and recipe.holder,
        "not verified": recipe and recipe.provenance,
    }
    return {heading: fact for heading, fact in facts.items() if fact}


def _cost(scheme: Scheme) -> str:
    share = scheme.parameters / baseline_parameters()
    streams = f"; {scheme.streams} residual streams" if scheme.streams > 1 else ""
    return (
        f"{scheme.parameters:+,} parameters ({share:+.3%}) and {scheme.norms} norms "
        f"at {REFERENCE}{streams}"
    )


def _recipes(kind: str) -> Table:
    title = f"{kind}: parameters beyond those of pre_ln with rmsnorm at {REFERENCE}"
    table = Table(title=title, title_justify="left")
    table.add_column(kind, no_wrap=True)
    table.add_column("formula")
    table.add_column("parameters", justify="right")
    table.add_column("stock class")
    for held in schemes(kind):
        formula, classes = "-", "-"
        if held.recipe is not None:
            formula = held.recipe.formula
            classes = ", ".join(c.removesuffix("ForCausalLM") for c in held.recipe.classes) or "-"
        table.add_row(
            held.name, formula, f"{held.parameters:+,}" if held.parameters else "0", classes
        )
    return table


def _in_full(held: Scheme) -> Table:
    table = Table(title=f"{held.kind} {held.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for heading, fact in known_facts(held).items():
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
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        options = inspect.signature(cls).parameters.values()
        shown = [option.name for option in options if option.default is not option.empty]
        table.add_row(name, summary, ", ".join(shown) or "-", source_of(cls))
    return table
