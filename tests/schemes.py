"""The table that the shared suites run over: the pairs, those that go through everything, kinds.

A new norm or placement is picked up by itself; `from schemes import SHAPE, FULL, PAIRS`. The facts
are those of `llmnorm.testing`, which everyone can run on a scheme of their own.
"""

from llmnorm import list_norms, list_placements
from llmnorm.placements import parse_placement
from llmnorm.testing import SHAPE, TOLERANCE, Scheme, find_scheme, tokens

__all__ = [
    "FULL",
    "KINDS",
    "NINE",
    "PAIRS",
    "POINTWISE",
    "REST",
    "SHAPE",
    "TOLERANCE",
    "Scheme",
    "tokens",
]


def _accepted(norm: str, placement: str) -> bool:
    accepts = parse_placement(placement).accepts
    return accepts is None or norm in accepts


# (norm, placement): every pair is built, trained a step, saved and loaded.
PAIRS: list[tuple[str, str]] = [
    (norm, placement)
    for placement in list_placements()
    for norm in list_norms()
    if _accepted(norm, placement)
]

# Every placement with its usual norm and every norm with pre_ln: they go through everything.
FULL: list[tuple[str, str]] = [
    (norm, placement)
    for norm, placement in PAIRS
    if placement == "pre_ln" or norm == find_scheme(placement).norm
]
REST = [pair for pair in PAIRS if pair not in FULL]

# The placements that most claims are made for.
NINE = (
    "pre_ln",
    "post_ln",
    "res_post_ln",
    "peri_ln",
    "mix_ln",
    "deepnorm",
    "normformer",
    "lns",
    "sub_ln",
)

# One scheme for each kind of wiring: slots inside and around the branch, constants, two kinds of
# block, shared norms, gates, two streams, an interpolated stream.
KINDS: list[tuple[str, str]] = [
    ("layernorm", "normformer"),
    ("rmsnorm", "mix_ln"),
    ("derf", "peri_ln"),
    ("rmsnorm", "deepnorm"),
    ("dyt", "parallel"),
    ("rmsnorm", "gpas"),
    ("rmsnorm", "hybrid_norm"),
    ("rmsnorm", "residual_dual"),
    ("rmsnorm", "siamese_norm"),
    ("l2norm", "ngpt"),
]

# Norms that bound features without normalizing them.
POINTWISE = ("dyt", "derf", "pointwise")
