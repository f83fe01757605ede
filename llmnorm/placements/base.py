"""What a placement is: a pure rule from a site and a norm to a `ResidualSpec`.

A placement is a frozen dataclass whose fields are its YAML options. To add one, write a file like
`pre_ln.py`, import it in `__init__.py` and give it a row in `tests/schemes.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from llmnorm.modeling.operations import check_kind, read_choice
from llmnorm.modeling.residual import NormSpec, ResidualSpec
from llmnorm.modeling.streams import StreamsSpec


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a sublayer stands. `layer_idx` is 0-based; papers' 1-based layer is `number`."""

    kind: Literal["attn", "mlp"]
    layer_idx: int
    depth: int
    num_attention_heads: int
    hidden_size: int

    @property
    def number(self) -> int:
        """The 1-based layer, as papers count."""
        return self.layer_idx + 1


@dataclass(frozen=True, kw_only=True)
class Placement(ABC):
    """Base of all placements.

    `init`, `embedding`, `weights` and `parametrization` are what the scheme asks for on the other
    axes, which a run may override; `accepts` names the norms it is defined for (None: any).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    init: ClassVar[Any] = "plain"
    embedding: ClassVar[Any] = "raw"
    weights: ClassVar[Any] = "plain"
    accepts: ClassVar[tuple[str, ...] | None] = None

    @property
    def parametrization(self) -> str | dict[str, Any]:
        """What the scheme asks of the config field of this name."""
        return "standard"

    @abstractmethod
    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        """The slots of the sublayer at `site`; `norm` already has the options of that site."""

    def final_norm(self, norm: NormSpec) -> NormSpec | None:
        """The norm before the head; None where the last block already ends in one."""
        return norm

    def logits(self, hidden_size: int) -> NormSpec | None:
        """What multiplies the logits; nothing by default."""
        return None

    def streams(self, norm: NormSpec) -> StreamsSpec | None:
        """The second residual stream; none by default. `norm` is the final site's."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Name and options, as `parse_placement` reads them; options that are None are left out."""
        return {"name": self.name, **{k: v for k, v in asdict(self).items() if v is not None}}


PLACEMENTS: dict[str, type[Placement]] = {}


def register(name: str, *, paper: str) -> Callable[[type[Placement]], type[Placement]]:
    """Enter a placement under `name`; `paper` is its arXiv number.

    Raises:
        ValueError: if the name is taken by another class.
    """

    def enter(cls: type[Placement]) -> type[Placement]:
        if name in PLACEMENTS and PLACEMENTS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"{name!r} is already registered by {PLACEMENTS[name].__qualname__}")
        cls.name, cls.paper = name, paper
        PLACEMENTS[name] = cls
        return cls

    return enter


def list_placements() -> list[str]:
    """Names of the registered placements, sorted."""
    return sorted(PLACEMENTS)


def parse_placement(value: str | Mapping[str, Any]) -> Placement:
    """Read a placement's name, or a mapping of `name` beside its options.

    Raises:
        ValueError: for an unknown name or option, with the nearest known one.
    """
    options = read_choice("placement", value, "name")
    name = options.pop("name", None)
    if name not in PLACEMENTS:
        near = get_close_matches(str(name), PLACEMENTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown placement {name!r}{hint}; known: {', '.join(list_placements())}")
    known = [f.name for f in fields(PLACEMENTS[name])]
    unknown = sorted(set(options) - set(known), key=str)
    if unknown:
        allowed = ", ".join(known) or "none"
        raise ValueError(f"{name} has no option {unknown[0]!r}; its options: {allowed}")
    for option in fields(PLACEMENTS[name]):
        if option.name in options and not option.metadata.get("checks_itself"):
            check_kind(f"{name}.{option.name}", options[option.name], like=option.default)
    return PLACEMENTS[name](**options)
