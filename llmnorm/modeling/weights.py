"""How matrices are held: plain, under weight normalization, or of constant norm.

The config field `weights` is an axis of its own beside norm and placement. `weight_norm` changes
the parameters; `unit`, `project` and `lawn` leave them as they are and constrain the optimizer's
steps, which the trainer does (`llmnorm.training.constraints`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as apply_linear
from transformers import initialization as init

from .operations import read_choice

_OUTPUT_PROJECTIONS = ("o_proj", "down_proj")
WEIGHT_OPTIONS = {
    "plain": (),
    "weight_norm": (),
    "unit": (),
    "project": ("interval_steps",),
    "lawn": ("free_steps",),
}


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """The config field `weights`: a kind's name, or a mapping of `kind` beside its options.

    `plain` nothing; `weight_norm` one learned length a row (Salimans and Kingma 2016,
    arXiv:1602.07868, from memory); `unit` every matrix, embedding and head included, of unit rows
    along the hidden axis, also after each optimizer step (nGPT, arXiv:2410.01131); `project` every
    `interval_steps` steps each matrix of n elements is brought back to the Frobenius norm that its
    init is expected to have, std sqrt(n) (normalize-and-project, arXiv:2407.01800, where it is the
    initial norm); `lawn` after `free_steps` steps the norm of each matrix is frozen and its
    gradient loses the part along it (LAWN, Gupta et al. 2021, from memory). All but `unit` concern
    the matrices inside the blocks: nothing normalizes what the head writes, so its length is left
    to learning. That and both defaults are ours.
    """

    kind: str = "plain"
    interval_steps: int = 1
    free_steps: int = 0

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any]") -> "WeightSpec":
        """Read the field; an unknown kind or option raises ValueError."""
        given = read_choice("weights", value, "kind")
        spec = cls(**{name: given[name] for name in asdict(cls()) if name in given})
        if spec.kind not in WEIGHT_OPTIONS:
            known = ", ".join(WEIGHT_OPTIONS)
            raise ValueError(f"weights is {spec.kind!r}; expected one of {known}")
        unknown = sorted(set(given) - {"kind", *WEIGHT_OPTIONS[spec.kind]}, key=str)
        if unknown:
            allowed = ", ".join(WEIGHT_OPTIONS[spec.kind]) or "none"
            raise ValueError(f"{spec.kind} has no option {unknown[0]!r}; its options: {allowed}")
        for name, least in (("interval_steps", 1), ("free_steps", 0)):
            count = getattr(spec, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"weights.{name} is {count!r}; expected a whole number >= {least}")
        return spec


def unit_dim(name: str) -> int:
    """Axis along which a matrix reads or writes the stream: 0 for output projections, else 1.

    Args:
        name: module name such as `model.layers.3.mlp.down_proj`, `model.embed_tokens`, `lm_head`.
    """
    return 0 if name.rpartition(".")[2] in _OUTPUT_PROJECTIONS else 1


class WeightNormLinear(nn.Linear):
    """A linear layer whose rows have learned lengths: y = length * (V x) / |V| + bias, row by row.

    Shape: `weight` is V (out, in), `length` is (out,), initially the rows' lengths, so that the
    layer starts as the plain one. The gradient of V is orthogonal to each of its rows.

    Source: Salimans and Kingma, "Weight Normalization", 2016, arXiv:1602.07868, from memory.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.length = nn.Parameter(torch.ones(out_features))

    def reset_length(self) -> None:
        """Set the lengths to those of the rows of `weight` as it is."""
        if not self.weight.is_meta:
            init.copy_(self.length, self.weight.detach().norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight * (self.length / self.weight.norm(dim=1)).unsqueeze(1)
        return apply_linear(x, rows, self.bias)


class UnitRowLinear(nn.Linear):
    """A head that scores with its rows' directions: y = (W x) / |W|, row by row.

    Source: Nguyen and Salazar, "Transformers without Tears", 2019, arXiv:1910.05895 (FixNorm).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def linear(config: Any, in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """A projection inside a block, as the config's `weights` asks."""
    held = WeightNormLinear if WeightSpec.parse(config.weights).kind == "weight_norm" else nn.Linear
    return held(in_features, out_features, bias=bias)


def build_head(config: Any) -> nn.Linear:
    """The head (hidden to vocabulary); with a tied FixNorm embedding it has unit rows as that."""
    norm = config.embedding_spec().norm
    fixed = config.tie_word_embeddings and norm is not None and norm.op == "fixnorm"
    return (UnitRowLinear if fixed else nn.Linear)(
        config.hidden_size, config.vocab_size, bias=False
    )
