"""Write the tables in docs/export.md from the code: which class holds a scheme, and how exactly.

    python docs/make_export_table.py

Tests fail while the committed tables are not what this writes, but for the numbers measured.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmnorm import build_config, build_model, list_norms, list_placements
from llmnorm.export import Form
from llmnorm.export.fitting import Fit, fit, nearest
from llmnorm.export.hosts import Host
from llmnorm.export.hosts.one_eps import with_one_eps
from llmnorm.export.stranger import Widened
from llmnorm.testing import find_scheme

PAGE = Path(__file__).resolve().parent / "export.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
NUMBER = re.compile(r"exact|< 1e-\d+")
"""What a measured cell holds."""

_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 4),
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_INTRODUCTION = """\
Measured in float64 on models of 4 layers of width 32 with random gains: `error` is the class
against the model that it came from, `eps` what the class's one eps for all norms changes, both the
largest difference of logits by their standard deviation, rounded up to a power of ten; `exact` is
below 1e-11. The random gates of gpas shrink the stream, and so raise its eps, far more than trained
ones.
"""
_ROUNDING = 1e-11  # relative, of float64 over a few layers
_PER_HEAD, _FULL = {"qk_norm": "per_head"}, {"qk_norm": "full_width"}
_LAYERNORM, _EMBEDDING = {"op": "layernorm", "bias": False}, {"embedding": "norm"}
_GPT2 = {"position": "learned", "mlp": "plain", "num_key_value_heads": 4}
_VARIANTS: list[tuple[str, str | dict[str, Any], dict[str, Any]]] = [
    ("pre_ln", "rmsnorm", _PER_HEAD),
    ("res_post_ln", "rmsnorm", _PER_HEAD),
    ("res_post_ln", "rmsnorm", _FULL),
    ("peri_ln", "rmsnorm", _PER_HEAD),
    ("sandwich_ln", "rmsnorm", _PER_HEAD),
    ("lns", "rmsnorm", _PER_HEAD),
    ("post_ln", "rmsnorm", _EMBEDDING),
    ("deepnorm", "rmsnorm", _EMBEDDING),
    ("pre_ln", "rmsnorm", {"embedding": "scale"}),
    ("pre_ln", "rmsnorm", {"parametrization": "mup"}),
    ("pre_ln", _LAYERNORM, {}),
    ("pre_ln", "layernorm", _GPT2),
    ("parallel", _LAYERNORM, {}),
    ("parallel", "layernorm", {}),
]
"""Schemes with an option that decides on the class."""
_HELD = ("placement", "norm", "with", "class", "folded", "error", "eps")
_UNHELD = ("placement", "norm", "with", "nearest class", "which")


@dataclass(frozen=True)
class Row:
    """A scheme, and the class that `auto` picks for it (None: the folder brings its own code)."""

    placement: str
    norm: str
    options: str
    form: Form
    fit: Fit | None

    def cells(self, *, measure: bool) -> list[str]:
        """What the tables say of it."""
        scheme = [self.placement, self.norm, self.options]
        if self.fit is None:
            host, obstacles = nearest(self.form)
            return [*scheme, _short(host), "; ".join(obstacles)]
        errors = measured(self.form, self.fit) if measure else ("exact", "exact")
        return [*scheme, _short(self.fit.host), folded(self.form, self.fit.form), *errors]


def tables(*, measure: bool = True) -> str:
    """Both tables in Markdown; without measuring, every number is `exact`."""
    known = list(rows())
    held = [row.cells(measure=measure) for row in known if row.fit is not None]
    unheld = [row.cells(measure=measure) for row in known if row.fit is None]
    between = ["", "These leave with their own code (`custom`):", ""]
    return "\n".join([_INTRODUCTION, *_table(_HELD, held), *between, *_table(_UNHELD, unheld)])


def _table(headings: Sequence[str], lines: list[list[str]]) -> list[str]:
    cells = [headings, ["---"] * len(headings), *lines]
    return ["| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in cells]


def _short(host: Host) -> str:
    return host.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def rows() -> Iterator[Row]:
    """Every placement with its usual norm, every norm with pre_ln, and variants."""
    for placement in list_placements():
        yield scheme(placement, find_scheme(placement).norm)
    yield from (scheme("pre_ln", norm) for norm in list_norms() if norm != "rmsnorm")
    yield from (scheme(placement, norm, **options) for placement, norm, options in _VARIANTS)


def folded(form: Form, held: Form) -> str:
    """What is in matrices and gains now, or written as another norm."""
    before, after = list(form.sublayers()), list(held.sublayers())
    slots: dict[str, None] = {}
    norms: dict[str, None] = {}
    for old, new in zip(before, after, strict=True):
        kept = new.spec.slots()
        for slot, spec in old.spec.slots().items():
            if slot not in kept:
                slots[f"{spec.op} in {slot}"] = None
            elif kept[slot].op not in (spec.op, "gain"):
                norms[f"{spec.op} as {kept[slot].op}"] = None
            elif spec.options.get("scale", 1.0) != 1:
                norms["constants of norms"] = None
    parts = [*slots, *norms]
    if form.embedding.treatment != held.embedding.treatment:
        parts.append(f"embedding {form.embedding.treatment}")
    parts += ["factor of the logits"] if form.logits is not None and held.logits is None else []
    return ", ".join(parts) or "nothing"


def measured(form: Form, fit: Fit) -> tuple[str, str]:
    """Differences of logits over their standard deviation: of the class, and of its one eps.

    All in float64: the class, widened where it asks for float32, against the source.
    """
    source, one = logits(form.to_model()), with_one_eps(fit.form)
    effect = far(logits(one.to_model()), logits(fit.form.to_model()), source)
    with Widened():
        error = far(logits(hosted(fit)), logits(one.to_model()), source)
    error = max(error, far(logits(fit.form.to_model()), source, source))
    return order(error), order(effect)


def hosted(fit: Fit) -> torch.nn.Module:
    """The class itself, with the form's weights."""
    config = fit.host.config(fit.form, torch.float64)
    config._experts_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        model = fit.host.model_class(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(fit.host.write(fit.form, torch.float64), strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a few random tokens."""
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(2))
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def far(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest difference, in standard deviations of `scale`."""
    return float((got - wanted).abs().max() / scale.std())


def order(number: float) -> str:
    """A number rounded up to a power of ten, which is the same on every machine."""
    return "exact" if number < _ROUNDING else f"< 1e{math.floor(math.log10(number)) + 1:03d}"


def page(text: str, new: str) -> str:
    """The page with the tables between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def scheme(placement: str, norm: str | dict[str, Any], **options: Any) -> Row:
    """A scheme on a small model whose weights are moved off their starts."""
    config = build_config(_SHAPE, norm=norm, placement=placement, **options)
    model = build_model(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    form = Form.of(model)
    op = {"op": norm} if isinstance(norm, str) else dict(norm)
    name = str(op.pop("op"))
    words = [f"norm.{key} {str(value).lower()}" for key, value in op.items()]
    words += [f"{key} {value}" for key, value in options.items() if key not in _SHAPE]
    return Row(placement, name, ", ".join(words), form, fit(form, "auto"))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    sys.stdout.write(f"{PAGE} is written\n")
