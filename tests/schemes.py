"""The table that the shared suites run over: a tiny shape, the pairs, the tolerance per dtype.

A new norm or placement is picked up by itself; `from schemes import SHAPE, FULL, PAIRS`.
"""

from typing import Any

import torch

from llmnorm import list_norms, list_placements

# Four layers, so that Mix-LN's default quarter is one; grouped heads; no two widths alike.
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# (norm, placement): every pair is built, trained a step, saved and loaded.
PAIRS: list[tuple[str, str]] = [
    (norm, placement) for placement in list_placements() for norm in list_norms()
]

# Every placement with rmsnorm and every norm with pre_ln: the pairs that go through everything.
FULL: list[tuple[str, str]] = [
    (norm, placement) for norm, placement in PAIRS if norm == "rmsnorm" or placement == "pre_ln"
]

# Norms that bound features without normalizing them.
POINTWISE = ("dyt", "derf", "pointwise")

# Largest difference of two computations of the same numbers, for values of order one.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


def tokens(batch: int = 2, seq: int = 9, *, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, seq) of SHAPE's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (batch, seq), generator=generator)
