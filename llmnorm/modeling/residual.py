"""Where norms sit and how a branch joins the residual stream: the specs, and the one module they
fill.

A sublayer F (attention or mlp) joins the stream as

    s = entry(x)
    y = out( skip(s) + post( F( pre(s) ) ) )

with `inner` before F's output projection and, in attention, `q`, `k`, `v` after the projections of
the same names. Each slot holds one operation of `norms.py` or `gains.py` or nothing. The specs are
plain data: `config.json` stores one pair a layer, so a checkpoint carries its own wiring diagram.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .gains import Constant  # noqa: F401 (enters the gains in the table)
from .norms import RMSNorm  # noqa: F401 (enters the norms in the table)
from .operations import check_options, operation, options_at, read_choice


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One operation with its options: what a slot holds.

    `per_head` applies it to the features of each head instead of all features (slots q, k, v only).
    """

    op: str
    options: Mapping[str, Any]
    per_head: bool = False

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | NormSpec") -> "NormSpec":
        """Read a name, or a mapping of `op` (and `per_head`) beside the operation's options.

        Raises:
            ValueError: for an unknown operation or an option it does not have.
        """
        if isinstance(value, NormSpec):
            return value
        fields_ = read_choice("the norm in a slot", value, "op")
        if "op" not in fields_:
            raise ValueError(f"a norm needs `op`; saw {fields_}")
        op, per_head = fields_.pop("op"), fields_.pop("per_head", False)
        if not isinstance(per_head, bool):
            raise ValueError(f"per_head is {per_head!r}; expected true or false")
        operation(op)
        return cls(op=op, options=fields_, per_head=per_head)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        return {"op": self.op, **self.options, **({"per_head": True} if self.per_head else {})}

    def at(self, kind: str, hidden_size: int) -> "NormSpec":
        """The same norm with the options of one kind of site (`attn`, `mlp`, `final`)."""
        options = options_at(self.op, self.options, kind, hidden_size)
        return NormSpec(op=self.op, options=options, per_head=self.per_head)

    def scaled(self, factor: float) -> "NormSpec":
        """The same norm with its output multiplied by a constant."""
        options = {**self.options, "scale": factor * self.options.get("scale", 1.0)}
        return NormSpec(op=self.op, options=options, per_head=self.per_head)

    def build(self, dim: int) -> nn.Module:
        """The module over `dim` features."""
        check_options(self.op, self.options)
        module = operation(self.op)(dim, **self.options)
        if any(True for _ in module.parameters()) and not hasattr(module, "reset_parameters"):
            raise ValueError(f"{self.op} has parameters but no reset_parameters() to start them")
        return module

    @property
    def pointwise(self) -> bool:
        """Whether the operation bounds features without normalizing them (DyT, Derf)."""
        return getattr(operation(self.op), "pointwise", False)


def constant(value: float) -> NormSpec:
    """A slot that multiplies by a fixed number."""
    return NormSpec(op="constant", options={"value": value})


_ATTENTION_SLOTS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """What the slots of one sublayer hold; None is nothing (identity)."""

    entry: NormSpec | None = None
    pre: NormSpec | None = None
    q: NormSpec | None = None
    k: NormSpec | None = None
    v: NormSpec | None = None
    inner: NormSpec | None = None
    post: NormSpec | None = None
    skip: NormSpec | None = None
    out: NormSpec | None = None

    def __post_init__(self) -> None:
        for slot, spec in self.slots().items():
            if spec.per_head and slot not in _ATTENTION_SLOTS:
                raise ValueError(f"per_head is for slots q, k and v; {spec.op} stands in {slot}")

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "ResidualSpec":
        """Read a mapping of slot names; an unknown slot raises ValueError."""
        slots = [f.name for f in fields(cls)]
        unknown = sorted(set(value) - set(slots))
        if unknown:
            raise ValueError(f"no slot is called {unknown[0]!r}; slots: {', '.join(slots)}")
        return cls(**{slot: NormSpec.parse(held) for slot, held in value.items()})

    def slots(self) -> dict[str, NormSpec]:
        """The filled slots by name."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: spec for name, spec in held.items() if spec is not None}

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse` reads; empty slots are left out."""
        return {name: spec.to_dict() for name, spec in self.slots().items()}


def parse_layer(layer: Mapping[str, Any]) -> tuple[ResidualSpec, ResidualSpec]:
    """Read `{"attn": slots, "mlp": slots}`; any other key or slot raises ValueError."""
    if set(layer) != {"attn", "mlp"}:
        raise ValueError(f"a layer of residuals has keys {sorted(layer)}; expected attn and mlp")
    attn, mlp = ResidualSpec.parse(layer["attn"]), ResidualSpec.parse(layer["mlp"])
    for slot in _ATTENTION_SLOTS:
        if getattr(mlp, slot) is not None:
            raise ValueError(f"slot {slot} is attention's; an mlp has none")
    return attn, mlp


def build_slot(spec: NormSpec | None, dim: int) -> nn.Module:
    """The module of a slot: the spec's operation over `dim` features, or identity."""
    return nn.Identity() if spec is None else spec.build(dim)


class Residual(nn.Module):
    """Join a branch to the residual stream as its spec says.

        s = entry(x);  y = out(skip(s) + post(branch(pre(s))))

    Shape: x and y are (batch, seq, hidden).
    """

    def __init__(self, spec: ResidualSpec, dim: int) -> None:
        super().__init__()
        self.entry = build_slot(spec.entry, dim)
        self.pre = build_slot(spec.pre, dim)
        self.post = build_slot(spec.post, dim)
        self.skip = build_slot(spec.skip, dim)
        self.out = build_slot(spec.out, dim)

    def forward(
        self, x: torch.Tensor, branch: Callable[..., torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        s = self.entry(x)
        return self.out(self.skip(s) + self.post(branch(self.pre(s), **kwargs)))
