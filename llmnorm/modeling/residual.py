"""Where norms sit and how a branch joins the residual stream: the specs, and the one module they
fill.

A sublayer F (attention or mlp) joins the stream as

    s = entry(x)
    y = out( skip(s) + post( F( pre(s) ) ) )

with `inner` before F's output projection, in attention `q`, `k`, `v` after the projections of these
names and `q_rotated`, `k_rotated` after RoPE, in the mlp `gate` and `up` after its projections.
Each slot holds one operation of the table in `operations.py`, or nothing. `reads` and `skips` may
name the block's input instead of s: for what the branch reads, and for what the skip carries. The
specs are plain data: `config.json` stores one pair a layer, so a checkpoint carries its own wiring
diagram. Joints that are no slots (`lerp.py`, `streams.py`) subclass `Residual` and are named in
`module`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from .fixed_std import FixedStd  # noqa: F401 (enters the table)
from .gains import Constant  # noqa: F401 (enters the gains in the table)
from .ngpt import NGPTGain  # noqa: F401 (enters the gains of nGPT in the table)
from .norms import RMSNorm  # noqa: F401 (enters the norms in the table)
from .operations import check_kind, check_mapping, check_options, operation, options_at, read_choice

_FLAGS = ("per_head", "shared")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One operation with its options: what a slot holds.

    `per_head` applies it to the features of each head instead of all features (slots q, k, v only).
    `shared`, in a slot of the mlp, applies the very module in attention's slot of the same name.
    """

    op: str
    options: Mapping[str, Any]
    per_head: bool = False
    shared: bool = False

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | NormSpec") -> "NormSpec":
        """Read a name, or a mapping of `op` (`per_head`, `shared`) beside the operation's options.

        Raises:
            ValueError: for an unknown operation or an option it does not have.
        """
        if isinstance(value, NormSpec):
            return value
        fields_ = read_choice("the norm in a slot", value, "op")
        if "op" not in fields_:
            raise ValueError(f"a norm needs `op`; saw {fields_}")
        flags = {name: fields_.pop(name) for name in _FLAGS if name in fields_}
        for name, flag in flags.items():
            check_kind(name, flag, like=False)
        op = fields_.pop("op")
        operation(op)
        return cls(op=op, options=fields_, **flags)

    @classmethod
    def parse_alone(cls, field: str, value: "str | Mapping[str, Any] | NormSpec") -> "NormSpec":
        """As `parse`, for a config field, where `per_head` and `shared` mean nothing."""
        spec = cls.parse(value)
        for name in _FLAGS:
            if getattr(spec, name):
                raise ValueError(
                    f"{field} cannot be {name} (saw {spec.op}); that is for the slots of a block"
                )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        return {"op": self.op, **self.options, **{n: True for n in _FLAGS if getattr(self, n)}}

    def at(self, kind: str, hidden_size: int) -> "NormSpec":
        """The same norm with the options of one kind of site (`attn`, `mlp`, `final`)."""
        op, options = options_at(self.op, self.options, kind, hidden_size)
        return replace(self, op=op, options=options)

    def scaled(self, factor: float) -> "NormSpec":
        """The same norm with its output multiplied by a constant."""
        key = "value" if self.op == "constant" else "scale"
        if key not in inspect.signature(operation(self.op).__init__).parameters:
            raise ValueError(f"{self.op} cannot be multiplied by a constant: it has no `scale`")
        return self.having(**{key: factor * self.options.get(key, 1.0)})

    def having(self, **options: Any) -> "NormSpec":
        """The same norm with these options changed."""
        return replace(self, options={**self.options, **options})

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


ATTENTION_SLOTS = ("q", "k", "v", "q_rotated", "k_rotated")
MLP_SLOTS = ("gate", "up")
RESIDUAL_SLOTS = ("entry", "pre", "post", "skip", "out")
SOURCES = ("stream", "block")


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """What the slots of one sublayer hold; None is nothing (identity).

    Args:
        first: for residual modules of two streams, which say what it does; likewise `second`.
        reads: what the branch reads: `stream` (s) or `block` (the block's input).
        skips: what the skip carries, likewise.
        module: name of the residual module (`register_residual`).
    """

    entry: NormSpec | None = None
    pre: NormSpec | None = None
    q: NormSpec | None = None
    k: NormSpec | None = None
    v: NormSpec | None = None
    q_rotated: NormSpec | None = None
    k_rotated: NormSpec | None = None
    gate: NormSpec | None = None
    up: NormSpec | None = None
    inner: NormSpec | None = None
    post: NormSpec | None = None
    skip: NormSpec | None = None
    out: NormSpec | None = None
    first: NormSpec | None = None
    second: NormSpec | None = None
    reads: str = "stream"
    skips: str = "stream"
    module: str = "residual"

    def __post_init__(self) -> None:
        for slot, spec in self.slots().items():
            if spec.per_head and slot not in ("q", "k", "v"):
                raise ValueError(f"per_head is for slots q, k and v; {spec.op} stands in {slot}")
        for name in ("reads", "skips"):
            if getattr(self, name) not in SOURCES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected stream or block")
        if not isinstance(self.module, str) or self.module not in RESIDUALS:
            known = ", ".join(sorted(RESIDUALS))
            raise ValueError(f"unknown residual module {self.module!r}; known: {known}")
        joint = RESIDUALS[self.module]
        for slot, spec in self.slots().items():
            if slot in ("first", "second") and slot not in joint.slots:
                raise ValueError(f"residual module {self.module} has no slot {slot}")
            if spec.shared and slot not in joint.slots:
                raise ValueError(f"slot {slot} cannot be shared; only {', '.join(joint.slots)}")
        if not joint.routed and (self.reads, self.skips) != ("stream", "stream"):
            raise ValueError(f"residual module {self.module} reads and skips the stream alone")

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "ResidualSpec":
        """Read a mapping of slot names, `reads`, `skips` and `module`.

        Raises:
            ValueError: for an unknown name, operation or option.
        """
        check_mapping("what the slots of a sublayer hold", value)
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(value) - set(names), key=str)
        if unknown:
            raise ValueError(f"no slot is called {unknown[0]!r}; slots: {', '.join(names)}")
        words = {name: value[name] for name in _WORDS if name in value}
        slots = {name: NormSpec.parse(held) for name, held in value.items() if name not in words}
        return cls(**words).having(**slots)

    def having(self, **slots: NormSpec) -> "ResidualSpec":
        """The same wiring with these slots filled otherwise."""
        return replace(self, **slots)  # type: ignore[arg-type]  # the other fields keep their type

    def slots(self) -> dict[str, NormSpec]:
        """The filled slots by name."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _WORDS}
        return {name: spec for name, spec in held.items() if spec is not None}

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse` reads; empty slots and defaults are left out."""
        words = {n: getattr(self, n) for n, usual in _WORDS.items() if getattr(self, n) != usual}
        return {**{name: spec.to_dict() for name, spec in self.slots().items()}, **words}


_WORDS = {"reads": "stream", "skips": "stream", "module": "residual"}


def parse_layer(layer: Mapping[str, Any]) -> tuple[ResidualSpec, ResidualSpec]:
    """Read `{"attn": slots, "mlp": slots}`; any other key or slot raises ValueError."""
    check_mapping("a layer of residuals", layer)
    if set(layer) != {"attn", "mlp"}:
        raise ValueError(
            f"a layer of residuals has keys {sorted(layer, key=str)}; expected attn and mlp"
        )
    attn, mlp = ResidualSpec.parse(layer["attn"]), ResidualSpec.parse(layer["mlp"])
    for spec, slots, owner, other in (
        (mlp, ATTENTION_SLOTS, "attention", "an mlp"),
        (attn, MLP_SLOTS, "the mlp", "attention"),
    ):
        for slot in slots:
            if getattr(spec, slot) is not None:
                raise ValueError(f"slot {slot} is {owner}'s; {other} has none")
    for slot, spec_ in attn.slots().items():
        if spec_.shared:
            raise ValueError(f"attention's slot {slot} is shared; only the mlp's can be")
    for slot, spec_ in mlp.slots().items():
        if spec_.shared and replace(spec_, shared=False) != getattr(attn, slot):
            raise ValueError(
                f"the mlp's slot {slot} is shared, but attention's holds another norm or other "
                "options; give both the same"
            )
    return attn, mlp


def build_slot(spec: NormSpec | None, dim: int) -> nn.Module:
    """The module of a slot: the spec's operation over `dim` features, or identity."""
    return nn.Identity() if spec is None else spec.build(dim)


class Shared(nn.Module):
    """Apply the module that another slot holds; its parameters are counted there."""

    def __init__(self, owner: nn.Module, slot: str) -> None:
        super().__init__()
        self._elsewhere = (owner,)  # a tuple, so that it is not registered twice
        self.slot = slot

    @property
    def module(self) -> nn.Module:
        """The module, where it lives."""
        return getattr(self._elsewhere[0], self.slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self._elsewhere[0], self.slot)(x)


RESIDUALS: dict[str, type["Residual"]] = {}


def register_residual(name: str) -> Callable[[type["Residual"]], type["Residual"]]:
    """Enter a residual module under `name`, for schemes whose joint is more than slots.

    Raises:
        ValueError: if the name is taken by another class.
    """

    def enter(cls: type["Residual"]) -> type["Residual"]:
        if name in RESIDUALS and RESIDUALS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"{name!r} is already registered by {RESIDUALS[name].__qualname__}")
        RESIDUALS[name] = cls
        return cls

    return enter


@register_residual("residual")
class Residual(nn.Module):
    """Join a branch to the residual stream as its spec says.

        s = entry(x);  y = out(skip(s) + post(branch(pre(s))))

    where the spec may let `pre` or `skip` take the block's input in place of s.

    Shape: x, block_input and y are (batch, seq, hidden).

    Args:
        spec: what the slots hold.
        dim: hidden size.
        block: for the mlp's residual, the block as built so far: `attn_residual`, `self_attn`.
    """

    slots: ClassVar[tuple[str, ...]] = RESIDUAL_SLOTS
    streams: ClassVar[int] = 1
    routed: ClassVar[bool] = True  # whether it follows `reads` and `skips`
    entry: nn.Module
    pre: nn.Module
    post: nn.Module
    skip: nn.Module
    out: nn.Module
    first: nn.Module
    second: nn.Module

    def __init__(self, spec: ResidualSpec, dim: int, block: Any = None) -> None:
        super().__init__()
        for slot in self.slots:
            held: NormSpec | None = getattr(spec, slot)
            if held is not None and held.shared:
                setattr(self, slot, Shared(block.attn_residual, slot))
            else:
                setattr(self, slot, build_slot(held, dim))
        self.reads, self.skips = SOURCES.index(spec.reads), SOURCES.index(spec.skips)

    def forward(
        self,
        x: torch.Tensor,
        block_input: torch.Tensor,
        branch: Callable[..., torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        s = (self.entry(x), block_input)
        f = self.post(branch(self.pre(s[self.reads]), **kwargs))
        return self.out(self.join(self.skip(s[self.skips]), f))

    def join(self, carried: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """What the skip carries and the branch, made one."""
        return carried + f


def build_residual(spec: ResidualSpec, dim: int, block: Any = None) -> Residual:
    """The residual module that a spec names."""
    return RESIDUALS[spec.module](spec, dim, block)
