"""What the checks are run on: a norm with a placement, at a shape that is built in milliseconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmnorm.build import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, read_choice
from llmnorm.placements import PLACEMENTS, list_placements, parse_placement
from llmnorm.resources import suggest

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

# Largest difference of two computations of the same numbers, for values of order one.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


class CheckError(AssertionError):
    """A scheme breaks a fact that every scheme must keep: what was seen, what was expected."""


def expect(kept: bool, seen: str, expected: str) -> None:
    """Raise CheckError unless a fact is kept."""
    if not kept:
        raise CheckError(f"saw {seen}; expected {expected}")


def tokens(batch: int = 2, seq: int = 9, *, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, seq) of SHAPE's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (batch, seq), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A norm with a placement; `options` are further arguments of `build_config`."""

    norm: str | Mapping[str, Any]
    placement: str | Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        norm = read_choice("norm", self.norm, "op")["op"]
        return f"{norm} + {read_choice('placement', self.placement, 'name')['name']}"

    def config(self, **fields: Any) -> LlmNormConfig:
        """Its config at SHAPE, but for these fields."""
        chosen = {**SHAPE, **fields, **self.options}
        return build_config({}, norm=self.norm, placement=self.placement, **chosen)

    def model(self, *, seed: int = 1, **fields: Any) -> LlmNormForCausalLM:
        """A fresh model in training mode, which has passed self_test."""
        return build_model(self.config(**fields), seed=seed).train()

    @torch.no_grad()
    def moved(self, *, std: float = 0.1, **fields: Any) -> LlmNormForCausalLM:
        """A float64 model whose every parameter is moved off its start, zeros and gates too."""
        model = self.model(**fields).double()
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(std * noise)
        return model


def find_scheme(
    name: str | Mapping[str, Any], *, norm: str | Mapping[str, Any] | None = None, **options: Any
) -> Scheme:
    """The scheme that `check_scheme` means by these arguments.

    Raises:
        ConfigError: for a name that is registered as neither, or a norm given with a norm's name.
    """
    by_op = isinstance(name, Mapping) and "op" in name
    called = name if isinstance(name, str) else name.get("op" if by_op else "name")
    if called in PLACEMENTS and not by_op:
        accepted = parse_placement(name).accepts or ("rmsnorm",)
        return Scheme(norm=norm or accepted[0], placement=name, options=options)
    if called not in list_norms():
        names = list_placements() + list_norms()
        raise ConfigError(f"no scheme is called {called!r}{suggest(str(called), names)}")
    if norm is not None:
        raise ConfigError(f"{called} is a norm, so no second one ({norm!r}) fits beside it")
    return Scheme(norm=name, placement="pre_ln", options=options)
