"""Write docs/schemes.md and the drawings in docs/schemes/ from the code.

    python docs/make_schemes.py

Tests fail while the committed files are not what this writes.
"""

from pathlib import Path

from llmnorm.drawing import draw
from llmnorm.listing import known_facts
from llmnorm.papers import arxiv
from llmnorm.recipes.facts import (
    REFERENCE,
    Choice,
    Entry,
    baseline_parameters,
    choice,
    choices,
    operators,
)

DOCS = Path(__file__).resolve().parent

INTRODUCTION = """\
# Schemes

A scheme is a norm in a placement; the two are chosen independently, and how matrices are held is a
third choice. `llmnorm list schemes` prints these tables, `llmnorm list schemes NAME` one row in
full. This page and its drawings are written by `docs/make_schemes.py` from the code and from
`llmnorm/recipes/`. Init, embedding, final norm, parameters and drawings are read from what the code
builds; formulas, hints and known failures are the papers', in our words.

N is the norm, F a sublayer (A attention), W_o and W_down its output projection, x the residual
stream, L the number of layers, l the 1-based layer, d the hidden size. Parameters are those beyond
pre_ln with rmsnorm, and norms all norms of the model, both at preset `{preset}`: {layers} layers of
width {width}, where pre_ln with rmsnorm has {total:,} parameters and {norms} norms. Defects of
published code are in [errata.md](errata.md).

Drawings flow upward, the stream on the left, the branch on the right. A dashed box is a module that
two sublayers share. Layers that differ in what stands where are drawn side by side.
"""


def pages() -> dict[str, str]:
    """Every file that this script writes: path below docs/ -> text."""
    placements, norms, weights = (_ours(kind) for kind in ("placement", "norm", "weights"))
    baseline = choice("pre_ln")
    text = [
        INTRODUCTION.format(
            preset=REFERENCE,
            layers=baseline.config.num_hidden_layers,
            width=baseline.config.hidden_size,
            total=baseline_parameters(),
            norms=baseline.norms,
        ),
        "## Placements\n",
        *_table("placement", placements, ("init", "embedding", "final_norm")),
        *(part for held in placements for part in _section(held)),
        "## Norms\n",
        *_table("norm", norms, ("embedding",)),
        *(part for held in norms for part in _section(held)),
        "## How matrices are held\n",
        *_table("weights", weights, ()),
        *(part for held in weights for part in _section(held)),
        "## Operators with running statistics\n",
        "They leak later tokens in training, so they are compared with their code and stand in\n"
        "no model.\n",
    ]
    text += [part for held in operators() for part in _section(held)]
    files = {f"schemes/{held.name}.svg": draw(held.config) for held in placements}
    return {"schemes.md": "\n".join(text), **files}


def _ours(kind: str) -> list[Choice]:
    """The choices of one kind that llmnorm itself registers."""
    return [held for held in choices(kind) if held.cls.__module__.startswith("llmnorm.")]


def _table(kind: str, held: list[Choice], facts: tuple[str, ...]) -> list[str]:
    """One row for each scheme, its name a link to its section."""
    headings = [kind, "formula", *(fact.replace("_", " ") for fact in facts)]
    headings += ["parameters", "norms", "stock class", "paper"]
    rows = [headings, ["---"] * len(headings)]
    for one in held:
        recipe = one.recipe
        papers = (f"[{number}](https://arxiv.org/abs/{number})" for number in arxiv(one.source))
        classes = recipe.classes if recipe else []
        cells = [f"[{one.name}](#{kind}-{one.name})", f"`{recipe.formula}`" if recipe else ""]
        cells += [getattr(one, fact) for fact in facts]
        cells += [f"{one.parameters:+,}" if one.parameters else "0", str(one.norms)]
        cells += [", ".join(name.removesuffix("ForCausalLM") for name in classes) or "none"]
        rows.append([*cells, ", ".join(papers)])
    return ["| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in rows] + [""]


def _section(held: Entry) -> list[str]:
    """A drawing, and all that is known."""
    lines = [f"### {held.kind} {held.name}\n"]
    facts = known_facts(held)
    if "what it is" in facts:
        lines += [facts.pop("what it is") + "\n"]
    if held.kind == "placement":
        lines += [f"![The block of {held.name}](schemes/{held.name}.svg)\n"]
    if "formula" in facts:
        facts["formula"] = f"`{facts['formula']}`"
    return [*lines, *(f"- {heading}: {fact}" for heading, fact in facts.items()), ""]


if __name__ == "__main__":
    (DOCS / "schemes").mkdir(exist_ok=True)
    files = pages()
    for old in (DOCS / "schemes").glob("*.svg"):
        if f"schemes/{old.name}" not in files:
            old.unlink()
    for path, text in files.items():
        (DOCS / path).write_text(text, encoding="utf-8")
